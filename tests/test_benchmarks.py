"""The benchmark refuses wrong results, and its report says what was measured, where and how."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("shapes", "truth", "peers", "rowwise", "measure", "report", "run")
PEERS = (  # a test below holds this equal to the table
    *("eager", "torch.compile", "lol-rl", "torch lce", "torch lce accurate"),
    *("torch lce balanced", "torch lce compact", "torch lce no options", "verl recompute"),
    *("trl", "liger", "liger fp32 dweight", "liger scaled", "cce", "cce no filter"),
    *("cce kahan", "cce torch_compile", "quack", "quack chunked", "liger chunked", "fla"),
)
COMPILED = ("torch.compile", "cce torch_compile")


@pytest.fixture(scope="module")
def b() -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path[:] = before


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "score", "logprob"])
def test_one_op_writes_json_and_the_markdown_made_from_it(
    op: str, b: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "here"
    memory = op == "linear_loss"  # a process of its own for each contestant: once is enough
    flags = ["--shape", "tiny", "--rounds", "4", "--threads", "1", "--out", str(out)]
    assert b.run.main([op, *flags, *(["--memory"] if memory else [])]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    where = {"device", "torch", "lolkernels", "commit", "source", "command", "peers", "date"}
    assert where <= set(record["environment"]) and record["rounds"] == 4
    (case,) = record["cases"]
    rows = {row["label"]: row for row in case["rows"]}
    assert {"lolkernels", "eager", case["floor"]} <= set(rows)
    assert all(len(row["times_ms"]) == 4 and min(row["times_ms"]) > 0 for row in rows.values())
    assert (rows["lolkernels"]["extra_bytes"] is not None) is memory
    if op != "logprob":
        assert rows["lolkernels"]["sum_error_nat"] <= 1e-3
        assert rows["lolkernels"]["formula_bytes"] > 0
        count = {"linear_loss": 3, "linear_logprob": 3, "score": 1}[op]
        assert {row["flops"] for row in rows.values()} == {count * 2 * 64 * 1000 * 32}
    else:
        assert rows["lolkernels"]["bytes"] == 3 * 4 * 64 * 1000
    page = out.with_suffix(".md").read_text()
    assert page == b.report.markdown(record)
    assert b.report.table(case) in capsys.readouterr().out
    for row in rows.values():
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['label']} |"))
        assert f" {row['median_ms']:.3f} |" in line and row["work"] in line


def test_backends_peers_passes_and_mixed_lengths_by_flag(
    b: SimpleNamespace, tmp_path: Path
) -> None:
    flags = ["linear_loss", "--shape", "tiny", "--tokens", "70", "--lengths", "3-16"]
    flags += ["--dtype", "bf16", "--frozen-head", "--pass", "forward", "--rounds", "2"]
    flags += ["--backend", "reference", "cpu", "--peer", "torch lce", "lol-rl", "fla"]
    assert b.run.main([*flags, "--out", str(tmp_path / "x")]) == 0
    record = json.loads((tmp_path / "x.json").read_text())
    (case,) = record["cases"]
    labels = ["lolkernels reference", "lolkernels cpu", "gemms", "torch lce", "lol-rl", "fla"]
    assert [row["label"] for row in case["rows"]] == labels
    assert {row["shape"] for row in case["rows"]} == {"T=70 D=32 V=1000 L=3-16 bf16"}
    assert "forward, frozen head" in case["title"] and case["rows"][-1]["skipped"]
    assert "--peer 'torch lce' lol-rl fla" in record["environment"]["command"]


def test_an_op_of_ours_that_fails_is_a_fault_and_a_peer_that_fails_is_not(
    b: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image")

    flags = ["score", "--shape", "tiny", "--rounds", "1", "--peer", "eager"]
    monkeypatch.setitem(b.peers.PEERS, "eager", b.peers.Peer(lambda: fails))
    assert b.run.main(flags) == 0
    assert "| eager | failed: RuntimeError: no kernel image |" in capsys.readouterr().out
    monkeypatch.setattr(b.peers, "build_lolkernels", fails)
    assert b.run.main(flags) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "no-such"], "--shape must be one of"),
        (["--shape", "100,8,50,7"], "must be a multiple of seq_len=7"),
        (["--shape", "0,8,50,7"], "must be positive"),
        (["--lengths", "a-b"], "--lengths must be N or SHORTEST-LONGEST"),
        (["--lengths", "100-128"], "between 1 and half of seq_len=128"),
        (["--prompt-share", "1"], "prompt_share must be at least 0 and below 1"),
        (["--peer", "no-such"], "invalid choice"),
        (["softmax"], "invalid choice"),
        (["score", "--pass", "backward"], "needs an op with a backward"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_bad_flags_say_what_to_change(
    flags: list[str], message: str, b: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        b.run.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_contestant_or_backend_is_named(b: SimpleNamespace) -> None:
    tiny = b.shapes.SHAPES["tiny"]
    with pytest.raises(ValueError, match=r"one of lolkernels, gemms.*got 'nobody'"):
        b.peers.build("nobody", "score", b.shapes.make_inputs(tiny))
    entry = b.measure.Entry("x", "lolkernels", "score", tiny, backend="nobody")
    (row,) = b.measure.time_entries([entry], 1)
    assert "nobody" in row.error and not row.times_ms


def test_the_cpu_suite_compares_with_everyone_and_its_goals_name_its_rows(
    b: SimpleNamespace,
) -> None:
    cases = list(b.run.cpu_suite(b.shapes.SHAPES["gpt2"]))
    for case in cases:
        labels = [entry.label for entry in case.entries]
        assert len(set(labels)) == len(labels)
        assert set(case.floors) <= set(labels)
        for goal in case.goals:
            assert {goal.row, goal.against or goal.row} <= set(labels), goal
    on_cpu = {name for name, peer in b.peers.PEERS.items() if not peer.gpu_only}
    assert on_cpu <= {entry.label for case in cases[:2] for entry in case.entries}
    assert sum(len(case.goals) for case in cases) > 15


def test_the_small_suite_is_the_cpu_suite_at_one_shape(b: SimpleNamespace) -> None:
    shape = b.shapes.SHAPES["tiny"]
    cases = b.run.small_suite(shape)
    assert len(cases) == len(list(b.run.cpu_suite(shape))) - 2
    for case in cases:
        assert not case.goals and not any(entry.memory for entry in case.entries)
        assert {entry.shape.vocab for entry in case.entries} == {shape.vocab}


def test_the_other_scripts_are_modes_of_the_driver(
    b: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in b.run.MODES:
        with pytest.raises(SystemExit) as stopped:
            b.run.main([mode, "--no-such-flag"])
        assert stopped.value.code == 2 and "error" in capsys.readouterr().err


# --- shapes ---------------------------------------------------------------------------------------


@given(st.data())
def test_mixed_lengths_fill_the_rows_and_keep_their_bounds(
    b: SimpleNamespace, data: st.DataObject
) -> None:
    longest = data.draw(st.integers(2, 60))
    shortest = data.draw(st.integers(1, longest // 2))
    tokens = data.draw(st.integers(shortest, 500))
    share = data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    shape = b.shapes.Shape(tokens, 8, 50, longest, "fp32", share, shortest)
    lengths = shape.lengths()
    assert sum(lengths) == tokens and all(shortest <= n <= longest for n in lengths)
    kept = [n - p for n, p in zip(lengths, shape.prompts(), strict=True)]
    assert sum(kept) == shape.scored and min(kept) > 0


def test_inputs_are_peaky_and_some_ratios_are_clipped(b: SimpleNamespace) -> None:
    shape = b.shapes.parse_shape("demo", 1024, "64-256")
    inputs = b.shapes.make_inputs(replace(shape, prompt_share=0.25))
    assert inputs.seq.num_tokens == shape.tokens - sum(inputs.shape.prompts())
    assert inputs.mask.sum() == inputs.seq.num_tokens == len(inputs.ref_logps)
    want = b.truth.truth("score", inputs)
    assert -3 < want.logps.mean() < -0.01
    drift = inputs.seq.sum(want.logps.float() - inputs.ref_logps)
    assert 0.1 < drift.std() < 3 and drift.max() > 0 > drift.min()
    again = b.shapes.make_inputs(inputs.shape)
    assert torch.equal(again.hidden, inputs.hidden) and torch.equal(again.upstream, inputs.upstream)


# --- the gate -------------------------------------------------------------------------------------

SPOIL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "scaled": lambda t: 1.02 * t,
    "rolled": lambda t: t.roll(1, 0),
    "nan": lambda t: t.new_full(t.shape, torch.nan),
    "cut": lambda t: t[1:],
}


@pytest.mark.parametrize("most_rows", [1 << 30, 40])  # every sequence, and some of them
@pytest.mark.parametrize("field", ["logps", "dhidden", "dweight"])
@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob"])
def test_a_wrong_result_is_never_timed(
    op: str, field: str, most_rows: int, b: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most_rows == 40 and field == "dweight":
        pytest.skip("dweight is checked where all sequences are")
    monkeypatch.setitem(b.measure.GATED_ROWS, "cpu", most_rows)
    b.measure._truth.cache_clear()
    shape = replace(b.shapes.SHAPES["tiny"], prompt_share=0.25)
    entry = b.measure.Entry("lolkernels", "lolkernels", op, shape)
    (row,) = b.measure.time_entries([entry], 1)
    assert row.times_ms and row.sum_error_nat < 1e-4
    honest = b.peers.build_lolkernels
    for how, change in SPOIL.items():

        def spoiled(*args: Any, change: Callable[..., Any] = change, **options: Any) -> Any:
            call = honest(*args, **options)

            def wrong(state: Any) -> Any:
                result = call.backward(state)
                return result._replace(**{field: change(getattr(result, field))})

            return b.peers.Call(call.forward, wrong)

        monkeypatch.setattr(b.peers, "build_lolkernels", spoiled)
        (row,) = b.measure.time_entries([entry], 1)
        assert row.wrong and not row.times_ms, how
        assert "WRONG" in b.report.reason_of(asdict(row))
    b.measure._truth.cache_clear()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_peer_is_never_timed(
    dtype: str, b: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return b.peers.eager(hidden * 2, weight, labels)

    monkeypatch.setitem(b.peers.PEERS, "eager", b.peers.Peer(lambda: doubled))
    shape = replace(b.shapes.SHAPES["tiny"], dtype=dtype)
    (row,) = b.measure.time_entries([b.measure.Entry("e", "eager", "linear_loss", shape)], 1)
    assert row.wrong and not row.times_ms


def test_wrong_gemms_are_never_timed(b: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = b.measure.Entry("g", "gemms", "linear_loss", b.shapes.SHAPES["tiny"])
    assert b.measure.time_entries([entry], 1)[0].times_ms
    monkeypatch.setattr(b.peers, "_mm", lambda a, b, out: torch.mm(1.02 * a, b, out=out))
    assert b.measure.time_entries([entry], 1)[0].wrong


# --- peers ----------------------------------------------------------------------------------------


def test_the_table_of_peers_is_the_one_tested(b: SimpleNamespace) -> None:
    assert tuple(b.peers.PEERS) == PEERS


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in COMPILED else []) for n in PEERS],
)
def test_a_peer_does_the_same_work(name: str, dtype: str, b: SimpleNamespace) -> None:
    """Those that run here, in Triton's interpreter too, pass the gate in every op."""
    shape = b.shapes.Shape(64, 32, 1000, 16, dtype, 0.25, 4)
    for frozen in (False, True):
        inputs = b.shapes.make_inputs(shape, frozen_head=frozen)
        for op in b.peers.OPS:
            try:
                call = b.peers.build(name, op, inputs)
                got = call()
            except (b.peers.UnavailableError, NotImplementedError) as error:
                pytest.skip(f"{name}: {error}")
            except Exception as error:
                if type(error).__name__ != "InterpreterError":
                    raise
                pytest.skip(f"{name}: Triton's interpreter cannot run it")
            want = b.truth.truth(op, inputs)
            check = b.truth.judge(got, want, inputs, strict=dtype == "fp32")
            assert not check.faults, (op, frozen)
            assert (got.dweight is None) is (frozen or op == "score")
            assert inputs.hidden.grad is None and inputs.weight.grad is None


def test_the_reference_implementation_runs_the_reference_models_head(b: SimpleNamespace) -> None:
    inputs = b.shapes.make_inputs(b.shapes.SHAPES["tiny"])
    call = b.peers.build("lol-rl", "linear_loss", inputs)
    assert call.holds == inputs.weight.nbytes
    want = call()
    inputs.ref_logps.fill_(torch.nan)  # it makes its own
    for got, exact in zip(call(), want, strict=True):
        assert torch.equal(got, exact)
    inputs.ref_hidden.mul_(1.5)
    assert not torch.equal(call().dhidden, want.dhidden)


def test_who_cannot_run_here_is_a_row_with_the_reason(b: SimpleNamespace) -> None:
    tiny = b.shapes.SHAPES["tiny"]
    names = ("quack chunked", "fla", "gemms fp32 out")
    entries = [b.measure.Entry(n, n, "linear_loss", tiny) for n in names]
    rows = b.measure.time_entries(entries, 1)
    assert ["sum or a mean" in row.skipped for row in rows] == [True, True, False]
    case = b.report.case("t", rows, ["gemms fp32 out"])
    assert b.report.table(case).count("not run: ") == 3 and not b.report.faulty(case)
    with pytest.raises(b.peers.UnavailableError, match="not-there is not installed"):
        b.peers.version("not-there")


@pytest.mark.parametrize("name", ["lolkernels", "eager", "gemms"])
def test_both_passes_are_timed_apart(name: str, b: SimpleNamespace) -> None:
    shape, seen = b.shapes.SHAPES["tiny"], {}
    for phase in b.measure.PHASES:
        entry = b.measure.Entry(name, name, "linear_loss", shape, phase=phase)
        c = b.measure.contestant(entry, torch.device("cpu"))
        assert not c.check().faults
        for _ in range(2):
            if c.prepare:
                c.prepare()
            seen[phase] = c.call()
        assert c.flops == {"both": 3, "forward": 1, "backward": 2}[phase] * 2 * 64 * 1000 * 32
    if name != "gemms":
        assert torch.equal(seen["both"].dweight, seen["backward"].dweight)


def test_memory_of_a_second_head_counts(b: SimpleNamespace) -> None:
    shape = b.shapes.Shape(8, 512, 20000, 8)
    extra = {
        name: b.measure.peak_memory(b.measure.Entry(name, name, "linear_loss", shape))
        for name in ("eager", "lol-rl")
    }
    head = 4 * 512 * 20000
    assert extra["lol-rl"] > head > extra["eager"]


# --- goals and pages ------------------------------------------------------------------------------


def rows(b: SimpleNamespace, **more: dict[str, Any]) -> list[dict[str, Any]]:
    plain = {
        "a": {"times_ms": [20.0, 21.0, 30.0], "extra_bytes": 105, "formula_bytes": 100},
        "b": {"times_ms": [20.0, 20.0, 20.0], "extra_bytes": 210, "tokens": 50},
    }
    found = []
    for label in {**plain, **more}:
        row = {"tokens": 100, "median_ms": 21.0, **plain.get(label, {}), **more.get(label, {})}
        found.append({**b.report.BLANK, "label": label, **row})
    return found


@pytest.mark.parametrize(
    ("of", "against", "want"),
    [
        ("time", "b", 1.05),
        ("per row", "b", 0.525),
        ("memory", "b", 0.5),
        ("formula", None, 0.05),
        ("bandwidth", "b", 2 * 20 / 21),
    ],
)
def test_goals_are_judged_by_their_definition(
    of: str, against: str | None, want: float, b: SimpleNamespace
) -> None:
    more = {"a": {"bytes": 20}, "b": {"bytes": 10}} if of == "bandwidth" else {}
    made = rows(b)
    for row in made:
        row.update(more.get(row["label"], {}))
    for limit, met in ((want + 1e-6, of != "bandwidth"), (want - 1e-6, of == "bandwidth")):
        found = b.report.judge(asdict(b.report.Goal("g", "a", limit, against, of)), made)
        assert found["measured"] == pytest.approx(want) and found["met"] is met


def test_a_goal_without_a_measurement_is_missed_or_not_judged(b: SimpleNamespace) -> None:
    untimed = {"times_ms": [], "median_ms": None}
    made = rows(
        b,
        wrong={**untimed, "wrong": ["off by 1"]},
        absent={**untimed, "skipped": "not installed"},
    )
    judged = {
        (row, against): b.report.judge(asdict(b.report.Goal("g", row, 1.0, against)), made)
        for row, against in (("wrong", "b"), ("a", "absent"), ("absent", "b"), ("nobody", "b"))
    }
    assert [found["met"] for found in judged.values()] == [False, None, False, False]
    page = b.report.goals_table(list(judged.values()))
    assert "MISSED (WRONG: off by 1)" in page and "not judged (not run: not installed)" in page


def test_the_page_is_a_function_of_the_record(b: SimpleNamespace) -> None:
    where = b.report.environment(command="the command", commit="abc")
    record = b.report.new(where, 3)
    made = rows(b, c={"times_ms": [], "error": "it fell"}, d={"times_ms": [], "wrong": ["bad"]})
    case = {**b.report.case("Title", [], ["b"]), "rows": made}
    minimal = {"title": "Less", "floor": "b", "rows": [{"label": "b", "times_ms": [1.0]}]}
    minimal["rows"][0]["median_ms"] = 1.0
    facts = b.report.case("Facts", [], [], facts=[{"label": "f", "value": 1.5, "unit": "us"}])
    failed = b.report.case("Failed", [], [], error="lost")
    record["cases"] = [case, minimal, facts, failed]
    record["left"] = ["Later"]
    b.report.judge_all(record)
    text = json.dumps(record)
    page = b.report.markdown(json.loads(text))
    assert page == b.report.markdown(json.loads(text)) and json.dumps(record) == text
    for part in (
        "the command",
        "commit abc",
        "failed: it fell",
        "WRONG: bad",
        "1.050 (1.025-1.275)",
    ):
        assert part in page
    assert "Not measured: lost" in page and "no time was left" in page and "| f | 1.5 us |" in page
    assert b.report.faulty(case) and b.report.faulty(failed) and not b.report.faulty(minimal)


@pytest.mark.parametrize("name", ["lolkernels", "eager"])
def test_a_flag_holds_for_the_call_and_no_longer(name: str, b: SimpleNamespace) -> None:
    tiny, cpu = b.shapes.SHAPES["tiny"], torch.device("cpu")
    seen = {}
    for flag in b.measure.FLAGS:
        entry = b.measure.Entry(name, name, "linear_loss", tiny, flag=flag)
        c = b.measure.contestant(entry, cpu)
        check = c.check()
        assert (not check.faults and c.formula is None) or flag == ""
        seen[flag] = check.gradients["dhidden"]
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.backends.cuda.matmul.allow_tf32
    assert seen["tf32"] == seen[""] < 1e-5  # a CPU has none
    if name == "eager":
        assert seen["autocast"] > 1e-4  # its products are in bf16
