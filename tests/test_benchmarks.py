"""The benchmark refuses wrong results, and its report says what was measured, where and how."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import peers
import pytest
import report
import run
import shapes
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from measure import Entry

TINY = shapes.SHAPES["tiny"]
PEERS = (  # a test below holds this equal to the table
    *("eager", "torch.compile", "lol-rl", "torch lce", "torch lce accurate"),
    *("torch lce balanced", "torch lce compact", "torch lce no options", "verl recompute"),
    *("trl", "liger", "liger fp32 dweight", "liger scaled", "cce", "cce no filter"),
    *("cce kahan", "cce torch_compile", "quack"),
)
COMPILED = ("torch.compile", "cce torch_compile")
CPU = torch.device("cpu")


def timed(*entries: Entry) -> list[measure.Row]:
    return measure.time_entries(list(entries), 1)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "score", "logprob"])
def test_one_op_writes_json_and_the_markdown_made_from_it(
    op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, memory = tmp_path / "here", op == "linear_loss"  # in a process for each contestant
    flags = ["--shape", "tiny", "--rounds", "4", "--threads", "1", "--out", str(out)]
    assert run.main([op, *flags, *(["--memory"] if memory else [])]) == 0
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
    assert page == report.markdown(record) and report.table(case) in capsys.readouterr().out
    for row in rows.values():
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['label']} |"))
        assert f" {row['median_ms']:.3f} |" in line and row["work"] in line


def test_backends_peers_passes_and_mixed_lengths_by_flag(tmp_path: Path) -> None:
    flags = ["linear_loss", "--shape", "tiny", "--tokens", "70", "--lengths", "3-16"]
    flags += ["--dtype", "bf16", "--frozen-head", "--pass", "forward", "--rounds", "2"]
    flags += ["--backend", "reference", "cpu", "--peer", "torch lce", "lol-rl", "cce"]
    assert run.main([*flags, "--out", str(tmp_path / "x")]) == 0
    record = json.loads((tmp_path / "x.json").read_text())
    (case,) = record["cases"]
    labels = ["lolkernels reference", "lolkernels cpu", "gemms", "torch lce", "lol-rl", "cce"]
    assert [row["label"] for row in case["rows"]] == labels
    assert {row["shape"] for row in case["rows"]} == {"T=70 D=32 V=1000 L=3-16 bf16"}
    assert "forward, frozen head" in case["title"] and case["rows"][-1]["skipped"]
    assert "--peer 'torch lce' lol-rl cce" in record["environment"]["command"]


def test_an_op_of_ours_that_fails_is_a_fault_and_a_peer_that_fails_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image")

    flags = ["score", "--shape", "tiny", "--rounds", "1", "--peer", "eager"]
    monkeypatch.setitem(peers.PEERS, "eager", peers.Peer(lambda: fails))
    assert run.main(flags) == 0
    assert "| eager | failed: RuntimeError: no kernel image |" in capsys.readouterr().out
    monkeypatch.setattr(peers, "build_lolkernels", fails)
    assert run.main(flags) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shape no-such", "--shape must be one of"),
        ("--shape 100,8,50,7", "must be a multiple of seq_len=7"),
        ("--shape 0,8,50,7", "must be positive"),
        ("--lengths a-b", "--lengths must be N or SHORTEST-LONGEST"),
        ("--lengths 100-128", "between 1 and half of seq_len=128"),
        ("--prompt-share 1", "prompt_share must be at least 0 and below 1"),
        ("--peer no-such", "invalid choice"),
        ("softmax", "invalid choice"),
        ("score --pass backward", "needs an op with a backward"),
        ("--rounds 0", "--rounds must be at least 1"),
        ("scaling --points 8", "--points needs one --axis"),
        ("scaling --axis tokens --points 100", "must be a multiple of seq_len"),
        ("scaling --axis depth", "invalid choice"),
        ("scaling --axis tokens --shape 64,32", "T,D,V,L[,dtype]"),
        ("compare HEAD --rounds 7", "--rounds must be at least 8"),
        ("compare HEAD --shapes 8,8", "T,D,V,L[,dtype]"),
        ("compare HEAD --ops softmax", "invalid choice"),
        ("train --sequences 1", "--sequences must be >= 2"),
        ("train --rounds 0", "--rounds must be at least 1"),
        ("train --memory lots", "--memory must be like 24GiB"),
        ("train --memory-budget some", "--memory-budget must be like 24GiB"),
        ("train --model gpt2", "invalid choice"),  # its blocks are not built here
        ("plots --plots pie", "invalid choice"),
        ("card --out x --stages smoke,nap", "stages are smoke, bench, tests, sanitizer"),
        ("card", "--out"),
    ],
)
def test_bad_flags_say_what_to_change(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(flags.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("mode", run.MODES)
def test_the_other_scripts_are_modes_of_the_driver(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main([mode, "--no-such-flag"])
    assert stopped.value.code == 2 and "error" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("mode", [[], ["scaling"], ["train"], ["compare", "HEAD"]])
def test_without_a_gpu_cuda_is_refused(mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main([*mode, "--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err


def test_an_unknown_contestant_or_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"one of lolkernels, gemms.*got 'nobody'"):
        peers.build("nobody", "score", shapes.make_inputs(TINY))
    (row,) = timed(Entry("x", "lolkernels", "score", TINY, backend="nobody"))
    assert "nobody" in row.error and not row.times_ms


def test_the_cpu_suite_compares_with_everyone_and_its_goals_name_its_rows() -> None:
    cases = list(run.cpu_suite(shapes.SHAPES["gpt2"]))
    for case in cases:
        labels = [entry.label for entry in case.entries]
        assert len(set(labels)) == len(labels) and set(case.floors) <= set(labels)
        for goal in case.goals:
            assert {goal.row, goal.against or goal.row} <= set(labels), goal
    on_cpu = {name for name, peer in peers.PEERS.items() if not peer.gpu_only}
    assert on_cpu <= {entry.label for case in cases[:2] for entry in case.entries}
    assert sum(len(case.goals) for case in cases) > 15
    small = run.small_suite(TINY)  # the same at one shape, times alone
    assert len(small) == len(cases) - 2
    for case in small:
        assert not case.goals and not any(entry.memory for entry in case.entries)
        assert {entry.shape.vocab for entry in case.entries} == {TINY.vocab}


# --- shapes ---------------------------------------------------------------------------------------


@given(st.data())
def test_mixed_lengths_fill_the_rows_and_keep_their_bounds(data: st.DataObject) -> None:
    longest = data.draw(st.integers(2, 60))
    shortest = data.draw(st.integers(1, longest // 2))
    tokens = data.draw(st.integers(shortest, 500))
    share = data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    shape = shapes.Shape(tokens, 8, 50, longest, "fp32", share, shortest)
    lengths = shape.lengths()
    assert sum(lengths) == tokens and all(shortest <= n <= longest for n in lengths)
    kept = [n - p for n, p in zip(lengths, shape.prompts(), strict=True)]
    assert sum(kept) == shape.scored and min(kept) > 0


def test_inputs_are_peaky_and_some_ratios_are_clipped() -> None:
    shape = shapes.parse_shape("demo", 1024, "64-256")
    inputs = shapes.make_inputs(replace(shape, prompt_share=0.25))
    assert inputs.seq.num_tokens == shape.tokens - sum(inputs.shape.prompts())
    assert inputs.mask.sum() == inputs.seq.num_tokens == len(inputs.ref_logps)
    want = truth.truth("score", inputs)
    assert -3 < want.logps.mean() < -0.01
    drift = inputs.seq.sum(want.logps.float() - inputs.ref_logps)
    assert 0.1 < drift.std() < 3 and drift.max() > 0 > drift.min()
    again = shapes.make_inputs(inputs.shape)
    assert torch.equal(again.hidden, inputs.hidden) and torch.equal(again.upstream, inputs.upstream)


# --- the gate -------------------------------------------------------------------------------------


def one_nan(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] = torch.nan
    return t


SPOIL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "scaled": lambda t: 1.02 * t,
    "rolled": lambda t: t.roll(1, 0),
    "nan": lambda t: t.new_full(t.shape, torch.nan),
    "one nan": one_nan,
    "cut": lambda t: t[1:],
}


@pytest.mark.parametrize("most_rows", [1 << 30, 40])  # every sequence, and some of them
@pytest.mark.parametrize("field", ["logps", "dhidden", "dweight"])
@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob"])
def test_a_wrong_result_is_never_timed(
    op: str, field: str, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most_rows == 40 and field == "dweight":
        pytest.skip("dweight is checked where all sequences are")
    monkeypatch.setitem(measure.GATED_ROWS, "cpu", most_rows)
    measure._truth.cache_clear()
    entry = Entry("lolkernels", "lolkernels", op, replace(TINY, prompt_share=0.25))
    (row,) = timed(entry)
    assert row.times_ms and row.sum_error_nat < 1e-4
    honest = peers.build_lolkernels
    for how, change in SPOIL.items():

        def spoiled(*args: Any, change: Callable[..., Any] = change, **options: Any) -> Any:
            call = honest(*args, **options)

            def wrong(state: Any) -> Any:
                result = call.backward(state)
                return result._replace(**{field: change(getattr(result, field))})

            return peers.Call(call.forward, wrong)

        monkeypatch.setattr(peers, "build_lolkernels", spoiled)
        (row,) = timed(entry)
        assert row.wrong and not row.times_ms, how
        assert "WRONG" in report.reason_of(asdict(row))
    measure._truth.cache_clear()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_peer_is_never_timed(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = peers.Peer(lambda: lambda hidden, *rest: peers.eager(hidden * 2, *rest))
    monkeypatch.setitem(peers.PEERS, "eager", doubled)
    (row,) = timed(Entry("e", "eager", "linear_loss", replace(TINY, dtype=dtype)))
    assert row.wrong and not row.times_ms


def test_wrong_gemms_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, honest = Entry("g", "gemms", "linear_loss", TINY), torch.mm
    assert timed(entry)[0].times_ms
    monkeypatch.setattr(torch, "mm", lambda a, b, out: honest(1.02 * a, b, out=out))
    assert timed(entry)[0].wrong


@pytest.mark.parametrize(
    ("off", "faults", "missed"),
    [(1e-6, 0, 0), (2e-3, 0, 1), (0.2, 1, 0), (float("nan"), 1, 0)],
)
def test_a_bound_that_is_missed_is_no_fault(off: float, faults: int, missed: int) -> None:
    """On tensor cores: 0.1 nat a sequence is wrong, 1e-3 is missed."""
    inputs = shapes.make_inputs(shapes.Shape(8, 4, 20, 8))
    want = truth.truth("score", inputs)
    got = truth.Result((want.logps + off / 8).float())
    seen = truth.judge(got, want, inputs, eager={})
    assert (len(seen.faults), len(seen.missed)) == (faults, missed)
    strict = truth.judge(got, want, inputs)
    assert len(strict.faults) == faults + missed and not strict.missed


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "ok"), (1.02, "missed"), (1.1, "wrong")])
def test_a_gradient_is_wrong_at_three_times_eagers_error(factor: float, verdict: str) -> None:
    inputs = shapes.make_inputs(shapes.Shape(8, 4, 20, 8))
    want = truth.truth("linear_logprob", inputs)
    full = torch.zeros_like(inputs.hidden.detach())
    full[inputs.rows] = (factor * want.dhidden).float()
    got = truth.Result(want.logps.float(), full, want.dweight.float())
    seen = truth.judge(got, want, inputs, eager={"dhidden": 0.02, "dweight": 0.02})
    assert (bool(seen.faults), bool(seen.missed)) == (verdict == "wrong", verdict == "missed")


# --- peers ----------------------------------------------------------------------------------------


def test_the_table_of_peers_is_the_one_tested() -> None:
    assert tuple(peers.PEERS) == PEERS


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in COMPILED else []) for n in PEERS],
)
def test_a_peer_does_the_same_work(name: str, dtype: str) -> None:
    """Those that run here, in Triton's interpreter too, pass the gate in every op."""
    shape = shapes.Shape(64, 32, 1000, 16, dtype, 0.25, 4)
    for frozen in (False, True):
        inputs = shapes.make_inputs(shape, frozen_head=frozen)
        for op in peers.OPS:
            try:
                got = peers.build(name, op, inputs)()
            except (peers.UnavailableError, NotImplementedError) as error:
                pytest.skip(f"{name}: {error}")
            except Exception as error:
                if type(error).__name__ != "InterpreterError":
                    raise
                pytest.skip(f"{name}: Triton's interpreter cannot run it")
            check = truth.judge(got, truth.truth(op, inputs), inputs, strict=dtype == "fp32")
            assert not check.faults, (op, frozen)
            assert (got.dweight is None) is (frozen or op == "score")
            assert inputs.hidden.grad is None and inputs.weight.grad is None


def test_the_reference_implementation_runs_the_reference_models_head() -> None:
    inputs = shapes.make_inputs(TINY)
    call = peers.build("lol-rl", "linear_loss", inputs)
    assert call.holds == inputs.weight.nbytes
    want = call()
    inputs.ref_logps.fill_(torch.nan)  # it makes its own
    assert all(torch.equal(*pair) for pair in zip(call(), want, strict=True))
    inputs.ref_hidden.mul_(1.5)
    assert not torch.equal(call().dhidden, want.dhidden)


def test_who_cannot_run_here_is_a_row_with_the_reason() -> None:
    rows = timed(*(Entry(n, n, "linear_loss", TINY) for n in ("quack", "gemms fp32 out")))
    case = report.case("t", rows, ["gemms fp32 out"])
    assert report.table(case).count("not run: ") == 2 and not report.faults(case)
    with pytest.raises(peers.UnavailableError, match="not-there is not installed"):
        peers.version("not-there")


@pytest.mark.parametrize("name", ["lolkernels", "eager", "gemms"])
def test_both_passes_are_timed_apart(name: str) -> None:
    seen = {}
    for phase in measure.PHASES:
        c = measure.contestant(Entry(name, name, "linear_loss", TINY, phase=phase), CPU)
        assert not c.check().faults
        for _ in range(2):
            if c.prepare:
                c.prepare()
            seen[phase] = c.call()
        assert c.flops == {"both": 3, "forward": 1, "backward": 2}[phase] * 2 * 64 * 1000 * 32
    if name != "gemms":
        assert torch.equal(seen["both"].dweight, seen["backward"].dweight)


def test_memory_of_a_second_head_counts() -> None:
    shape = shapes.Shape(8, 512, 20000, 8)
    eager, script = (
        measure.peak_memory(Entry(n, n, "linear_loss", shape)) for n in ("eager", "lol-rl")
    )
    assert script > 4 * 512 * 20000 > eager


@pytest.mark.parametrize("name", ["lolkernels", "eager"])
def test_a_flag_holds_for_the_call_and_no_longer(name: str) -> None:
    seen = {}
    for flag in measure.FLAGS:
        c = measure.contestant(Entry(name, name, "linear_loss", TINY, flag=flag), CPU)
        check = c.check()
        assert (not check.faults and c.formula is None) or flag == ""
        seen[flag] = check.gradients["dhidden"]
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.backends.cuda.matmul.allow_tf32
    assert seen["tf32"] == seen[""] < 1e-5  # a CPU has none
    if name == "eager":
        assert seen["autocast"] > 1e-4  # its products are in bf16


# --- goals and pages ------------------------------------------------------------------------------


def rows_of(**more: dict[str, Any]) -> list[dict[str, Any]]:
    plain: dict[str, dict[str, Any]] = {
        "a": {"times_ms": [20.0, 21.0, 30.0], "extra_bytes": 105, "formula_bytes": 100},
        "b": {"times_ms": [20.0, 20.0, 20.0], "extra_bytes": 210, "tokens": 50},
    }
    common = {**report.BLANK, "tokens": 100, "median_ms": 21.0}
    return [
        {**common, "label": label, **plain.get(label, {}), **more.get(label, {})}
        for label in {**plain, **more}
    ]


@pytest.mark.parametrize(
    ("of", "against", "want"),
    [
        ("time", "b", 1.05),
        ("memory", "b", 0.5),
        ("formula", None, 0.05),
        ("bandwidth", "b", 2 * 20 / 21),
    ],
)
def test_goals_are_judged_by_their_definition(of: str, against: str | None, want: float) -> None:
    made = rows_of(**({"a": {"bytes": 20}, "b": {"bytes": 10}} if of == "bandwidth" else {}))
    for limit, met in ((want + 1e-6, of != "bandwidth"), (want - 1e-6, of == "bandwidth")):
        found = report.judge(asdict(report.Goal("g", "a", limit, against, of)), made)
        assert found["measured"] == pytest.approx(want) and found["met"] is met


def test_a_goal_without_a_measurement_is_missed_or_not_judged() -> None:
    untimed: dict[str, Any] = {"times_ms": [], "median_ms": None}
    absent = {**untimed, "skipped": "not installed"}
    made = rows_of(wrong={**untimed, "wrong": ["off by 1"]}, absent=absent)
    judged = [
        report.judge(asdict(report.Goal("g", row, 1.0, against)), made)
        for row, against in (("wrong", "b"), ("a", "absent"), ("absent", "b"), ("nobody", "b"))
    ]
    assert [found["met"] for found in judged] == [False, None, False, False]
    page = report.goals_table(judged)
    assert "MISSED (WRONG: off by 1)" in page and "not judged (not run: not installed)" in page


def test_the_page_is_a_function_of_the_record() -> None:
    record = report.new(report.environment(command="the command", commit="abc"), 3)
    made = rows_of(c={"times_ms": [], "error": "it fell"}, d={"times_ms": [], "wrong": ["bad"]})
    case = {**report.case("Title", [], ["b"]), "rows": made}
    minimal: dict[str, Any] = {"title": "Less", "floor": "b"}
    minimal["rows"] = [{"label": "b", "times_ms": [1.0], "median_ms": 1.0}]
    facts = report.case("Facts", [], [], facts=[{"label": "f", "value": 1.5, "unit": "us"}])
    failed = report.case("Failed", [], [], error="lost")
    record["cases"], record["left"] = [case, minimal, facts, failed], ["Later"]
    report.judge_all(record)
    text = json.dumps(record)
    page = report.markdown(json.loads(text))
    assert page == report.markdown(json.loads(text)) and json.dumps(record) == text
    for part in (
        *("the command", "commit abc", "failed: it fell", "WRONG: bad", "1.050 (1.025-1.275)"),
        *("Not measured: lost", "no time was left", "| f | 1.5 us |"),
    ):
        assert part in page
    assert report.faults(case) and report.faults(failed) and not report.faults(minimal)
