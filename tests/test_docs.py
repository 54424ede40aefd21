"""README and docs: code and commands run as they stand, and what they name exists.

A fenced block is run in the order of its page; one marked ``not-run`` (it needs a network, a GPU,
several processes or an hour) is only held to name what exists.
"""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_examples import EXAMPLES, skip_without

import lolkernels as lk
from lolkernels import info
from lolkernels.backends.contract import Backend
from lolkernels.objectives import REGISTRY, defaults, side_inputs
from lolrl import cli
from lolrl.files import write_jsonl
from lolrl.tiny import build_model, build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"models.md"}  # see test_families
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
PAGES = [page for page in PAGES if Path(page).name not in GENERATED]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*) *([\w-]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# How many blocks are not run, so that none is taken out of the tests unseen.
NOT_RUN = {"README.md": 1, "docs/benchmarks.md": 1, "docs/recipe.md": 1, "docs/devices.md": 2}
BASH_PAGES = [page for page in PAGES if re.search(r"^```bash$", TEXTS[page], re.MULTILINE)]


def blocks(page: str, language: str, mark: str = "") -> list[str]:
    found = FENCE.findall(TEXTS[page])
    return [code for lang, marked, code in found if (lang, marked) == (language, mark)]


def commands(page: str, mark: str = "") -> Iterator[list[str]]:
    for block in blocks(page, "bash", mark):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reader stands: a small model, and data with a prompt and a completion."""
    texts = [f"the film is {w}" for w in ("good", "great", "dull", "bad", "a joy", "a bore")]
    rows = [
        {"prompt": t[:8], "completion": f"{t[8:]}, and {i} times so"} for t in texts for i in (2, 3)
    ]
    tokenizer = build_tokenizer(texts, vocab_size=300)
    build_model(tokenizer, layers=1, width=32, positions=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "rewarded.jsonl", [r | {"reward": i / 12} for i, r in enumerate(rows)])
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": t} for t in texts])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def surroundings(folder: Path) -> Iterator[dict[str, Any]]:
    """What the pages' reader already has, by the names that the pages use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 3:7] = True
    vocab, width = model.lm_head.weight.shape
    batch = {
        "input_ids": torch.randint(vocab, (4, 8)),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
        "completion_mask": mask,
        "ref_logps": torch.full((16,), -5.0),
        "advantages": torch.tensor([1.0, 0.5, 2.0, -1.0]),
    }
    registered = dict(REGISTRY)
    yield {
        "__name__": "docs",
        "lk": lk,
        "torch": torch,
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(folder / "model"),
        "loader": [batch, batch],
        "batch": batch,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "hidden": torch.randn(4, 8, width, requires_grad=True),
        "weight": torch.randn(vocab, width, requires_grad=True),
        "labels": torch.randint(vocab, (4, 8)),
        **batch,
    }
    REGISTRY.clear()
    REGISTRY.update(registered)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")])
def test_the_code_of_a_page_runs_in_order(
    page: str, surroundings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    code = blocks(page, "python")
    skip_without("\n".join(code))
    if "torch.distributed" in TEXTS[page]:
        request.getfixturevalue("one_rank")
    for block in code:
        exec(compile(block, page, "exec"), surroundings)


def test_the_readmes_code_trains(surroundings: dict[str, Any]) -> None:
    before = surroundings["model"].lm_head.weight.detach().clone()
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), surroundings)
    assert not torch.equal(before, surroundings["model"].lm_head.weight)
    for name in ("hidden", "weight"):
        grad = surroundings[name].grad
        assert bool(grad.isfinite().all()) and bool(grad.abs().sum() > 0)


def test_ten_lines_are_ten_lines() -> None:
    code = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert len(code) <= 12  # the ten of the loop's body and the import


@pytest.mark.parametrize("page", BASH_PAGES)
def test_the_commands_of_a_page_run(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands(page):
        if words[0] == "lolrl":
            try:
                status = cli.main(words[1:])
            except SystemExit as stop:  # --help
                status = stop.code
            assert status == 0, (words, capsys.readouterr().err)
        elif words[:3] == ["python", "-m", "lolkernels.info"]:
            monkeypatch.setattr(sys, "argv", words[2:])
            info.main()
        else:
            # test_examples runs it.
            assert words[0] == "python" and ROOT / words[1] in EXAMPLES, words


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_names_what_exists(page: str) -> None:
    marked = [code for _, mark, code in FENCE.findall(TEXTS[page]) if mark == "not-run"]
    assert len(marked) == NOT_RUN.get(page, 0)
    assert {mark for _, mark, _ in FENCE.findall(TEXTS[page])} <= {"", "not-run"}
    for code in blocks(page, "python", "not-run"):
        ast.parse(code)
    extras = (
        (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1].split("\n[")[0]
    )
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page, "not-run"):
        assert words[0] in ("make", "pip", "python", "lolrl", "torchrun", "accelerate"), words
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words
        if words[0] == "lolrl":
            assert words[1] in cli.VERBS, words
        for word in words[1:]:
            assert not word.endswith(".py") or (ROOT / word).is_file(), words
            for extra in re.findall(r"^\.\[([\w,]+)\]", word):
                assert all(re.search(rf"^{e} = ", extras, re.MULTILINE) for e in extra.split(","))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_make_targets_exist(page: str) -> None:
    text, makefile = TEXTS[page], (ROOT / "Makefile").read_text()
    for target, anchor in re.findall(r"(?:\]\(|srcset=\"|src=\")([^)\"#]*)#?([\w-]*)", text):
        if target.startswith("https://"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
    for target in re.findall(r"`make ([a-z][\w-]*)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def needs(name: str) -> str:
    """What an objective takes, for its row of the table."""
    inputs = [k for k, kind in side_inputs(REGISTRY[name]).items() if kind != "option"]
    options = [f"{k}={v}" for k, v in defaults(REGISTRY[name]).items()]
    return f"{', '.join(inputs)} | {', '.join(options)}"


def test_every_objective_is_in_the_table_with_what_it_takes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*? \| .*?) \|$", TEXTS["docs/objectives.md"], re.M)
    assert [(name, needs(name)) for name in REGISTRY] == rows


def test_the_recipes_table_is_the_published_one() -> None:
    def rows(text: str) -> dict[str, list[str]]:
        cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
        return {row[0]: row[1:9] for row in cells if len(row) > 9 and row[0] in methods}

    methods = {"sft", *REGISTRY}
    published = (ROOT / "benchmarks" / "results" / "demo" / "results.md").read_text()
    assert rows(TEXTS["docs/recipe.md"]) == rows(published) != {}


def test_every_backend_and_only_those_is_in_the_table() -> None:
    section = TEXTS["docs/devices.md"].split("## Backends")[1].split("\n## ")[0]
    offered = set(lk.available_backends()) - {"cuda_host"}  # the tests' own
    assert set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == offered


def test_contributing_fills_in_the_whole_record_of_a_backend() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    given = re.findall(r"^       (\w+)=", text.split("BACKEND = Backend(")[1], re.MULTILINE)
    assert given == [f for f in Backend._fields if f not in Backend._field_defaults]


def test_the_two_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{lk.__version__}"\n' in pyproject
    assert f"version: {lk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {lk.__version__}" in (ROOT / "CHANGELOG.md").read_text()
