"""The README's code runs as it stands, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lolkernels as lk
from lolrl import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def surroundings() -> dict[str, object]:
    """What the README's reader already has: model, loader, optimizer, hidden states."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 3:7] = True
    batch = {
        "input_ids": torch.randint(50, (3, 8)),
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
        "completion_mask": mask,
        "ref_logps": torch.full((12,), -3.9),
        "advantages": torch.tensor([1.0, 0.5, 2.0]),
    }
    return {
        "model": model,
        "loader": [batch, batch],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "hidden": torch.randn(3, 8, 16, requires_grad=True),
        "weight": torch.randn(50, 16, requires_grad=True),
        "labels": torch.randint(50, (3, 8)),
        **batch,
    }


def test_the_code_runs_in_order_and_trains(surroundings: dict[str, object]) -> None:
    assert len(BLOCKS) == 3
    model = surroundings["model"]
    assert isinstance(model, LlamaForCausalLM)
    before = model.lm_head.weight.detach().clone()
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), surroundings)
    assert not torch.equal(before, model.lm_head.weight)
    for name in ("hidden", "weight"):
        tensor = surroundings[name]
        assert isinstance(tensor, torch.Tensor) and tensor.grad is not None
        assert bool(tensor.grad.isfinite().all()) and bool(tensor.grad.abs().sum() > 0)


def test_ten_lines_are_ten_lines() -> None:
    code = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(code) <= 12  # the ten of the loop's body and the import


def test_every_objective_of_the_table_exists_and_none_is_left_out() -> None:
    named = set(re.findall(r"^\| `(\w+)` \| ", README, flags=re.MULTILINE))
    named -= set(lk.available_backends())
    assert named == set(lk.objectives.REGISTRY)


def test_every_backend_and_only_those_is_in_the_table() -> None:
    section = README.split("## Backends")[1].split("\n## ")[0]
    offered = set(lk.available_backends()) - {"cuda_host"}  # the tests' own
    assert set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == offered


def test_links_make_targets_and_verbs_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z][\w-]*)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out
    for verb in set(re.findall(r"^lolrl (\w+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^ +{verb} ", usage, flags=re.MULTILINE), verb


def test_the_two_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{lk.__version__}"\n' in pyproject
    assert f"version: {lk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {lk.__version__}" in (ROOT / "CHANGELOG.md").read_text()
