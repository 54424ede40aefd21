"""``python -m lolkernels.info``: the report and the route of a shape."""

import subprocess
import sys

import pytest
import torch

import lolkernels as lk
from lolkernels import info, memory


def test_the_report_names_versions_and_every_backend() -> None:
    text = info.report()
    assert lk.__version__ in text and torch.__version__ in text and "triton" in text
    for name, why in lk.available_backends().items():
        assert any(line.split()[:1] == [name] for line in text.splitlines())
        assert why is None or why in text


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [
        ("reference", torch.float32, ("stored as they are", "300 rows x 2048 columns")),
        ("reference", torch.bfloat16, ("float32 operands, converted panel by panel",)),
        ("triton", torch.bfloat16, ("bfloat16 operands, stored as they are", "300 whole rows")),
    ],
)
def test_the_route_of_a_shape(backend: str, dtype: torch.dtype, words: tuple[str, ...]) -> None:
    text = info.route(torch.device("cpu"), dtype, 300, 64, 50257, backend=backend)
    kept = "exponentials of 300 rows" if backend == "triton" else "exponentials of 256 rows"
    assert all(word in text for word in (*words, kept)), text
    extra = memory.extra_bytes(
        "score",
        num_rows=300,
        hidden_size=64,
        vocab=50257,
        hidden_bytes=dtype.itemsize,
        weight_bytes=dtype.itemsize,
    )
    assert f"{extra / 2**20:.1f} MiB" in text


def test_the_command_and_bad_flags(monkeypatch, capsys) -> None:
    def call(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["info", *flags])
        info.main()

    call("--rows", "8", "--hidden", "4", "--vocab", "9", "--device", "cpu")
    assert "route of (8, 4) x (9, 4)" in capsys.readouterr().out
    for flags, words in (
        (["--rows", "8"], "--rows, --hidden and --vocab"),
        (["--rows", "8", "--hidden", "-4", "--vocab", "9"], "all > 0"),
        (["--backend", "nope"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(*flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lolkernels.info"], capture_output=True, text=True)
    assert done.returncode == 0 and lk.__version__ in done.stdout, done.stderr
