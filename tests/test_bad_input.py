"""Bad input: every public function names the argument at fault, before anything is computed."""

import inspect
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import lolkernels as lk
from lolkernels import backends, checks, objectives
from lolkernels.backends import TABLE
from lolkernels.objectives import PerSequence

N, D, V = 6, 4, 11
NAN, INF = math.nan, math.inf


def good() -> dict[str, Any]:
    """Arguments of linear_logprob that work."""
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(N, D),
        "weight": torch.randn(V, D),
        "labels": torch.arange(N),
        "bias": torch.randn(V),
        "mask": torch.ones(N, dtype=torch.bool),
        "temperature": 0.7,
        "softcap": 30.0,
        "logit_scale": 2.0,
        "backend": None,
        "memory_budget": 10**6,
    }


def good_logits() -> dict[str, Any]:
    shared = {
        k: v for k, v in good().items() if k in ("labels", "temperature", "softcap", "logit_scale")
    }
    return {"logits": torch.randn(N, V), **shared, "backend": None}


def good_loss() -> dict[str, Any]:
    arguments = good()
    del arguments["mask"]
    return {
        "objective": objectives.a_lol,
        **arguments,
        "seq": lk.Sequences.from_lengths([4, 2]),
        "ref_logps": -torch.rand(N),
        "advantages": torch.rand(2),
    }


def replace(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    monkeypatch.setitem(TABLE, name, TABLE[name]._replace(**fields))


class Spy:
    """Counts the launches: calls of any row function of any backend."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches = 0
        for name, backend in TABLE.items():
            functions = ("exps_", "sums", "dlogits_", "sequence_coef")
            spies = {f: self.counting(getattr(backend, f)) for f in functions}
            replace(monkeypatch, name, **spies)

    def counting(self, f: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*a: Any, **k: Any) -> Any:
            self.launches += 1
            return f(*a, **k)

        return counted


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


# --- the table: what changes, the error, words that must be in its message ------------------------

TYPE, VALUE = TypeError, ValueError
Row = tuple[dict[str, Any], type[Exception], str]

HEAD_ROWS: dict[str, Row] = {
    "hidden is a list": ({"hidden": [[1.0]]}, TYPE, "hidden.*list"),
    "hidden is None": ({"hidden": None}, TYPE, "hidden"),
    "hidden bool": ({"hidden": torch.ones(N, D, dtype=torch.bool)}, TYPE, "hidden.*bool"),
    "hidden complex": ({"hidden": torch.ones(N, D) * 1j}, TYPE, "hidden.*complex"),
    "hidden float8": ({"hidden": torch.ones(N, D).to(torch.float8_e4m3fn)}, TYPE, "hidden.*float8"),
    "hidden of rank 1": ({"hidden": torch.randn(D)}, VALUE, "hidden"),
    "hidden of rank 0": ({"hidden": torch.tensor(1.0)}, VALUE, "hidden"),
    "hidden too wide": ({"hidden": torch.randn(N, D + 1)}, VALUE, f"hidden.*{D + 1}"),
    "hidden too narrow": ({"hidden": torch.randn(N, D - 1)}, VALUE, f"hidden.*{D - 1}"),
    "weight is None": ({"weight": None}, TYPE, "weight"),
    "weight is a module": ({"weight": torch.nn.Linear(D, V)}, TYPE, "weight.*Linear"),
    "weight of rank 1": ({"weight": torch.randn(D)}, VALUE, "weight"),
    "weight of rank 3": ({"weight": torch.randn(1, V, D)}, VALUE, "weight"),
    "weight transposed": ({"weight": torch.randn(D, V)}, VALUE, "weight"),
    "weight not gathered": ({"weight": torch.randn(0)}, VALUE, "weight"),
    "weight without rows": ({"weight": torch.randn(0, D)}, VALUE, "weight.*empty.*gathered"),
    "weight without columns": ({"weight": torch.randn(V, 0)}, VALUE, "weight.*empty"),
    "labels is a list": ({"labels": [0] * N}, TYPE, "labels.*list"),
    "labels of floats": ({"labels": torch.zeros(N)}, TYPE, "labels.*float32"),
    "labels of bools": ({"labels": torch.zeros(N, dtype=torch.bool)}, TYPE, "labels.*bool"),
    "labels of int16": ({"labels": torch.zeros(N, dtype=torch.int16)}, TYPE, "labels.*int16"),
    "labels of uint8": ({"labels": torch.zeros(N, dtype=torch.uint8)}, TYPE, "labels.*uint8"),
    "labels that require grad": (
        {"labels": torch.zeros(N, requires_grad=True)},
        TYPE,
        "labels.*float32",
    ),
    "labels too short": ({"labels": torch.zeros(N - 1, dtype=torch.int64)}, VALUE, "labels"),
    "labels too long": ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, VALUE, "labels"),
    "labels of rank 2": ({"labels": torch.zeros(N, 1, dtype=torch.int64)}, VALUE, "labels"),
    "labels of rank 0": ({"labels": torch.tensor(0)}, VALUE, "labels"),
    "bias too short": ({"bias": torch.randn(V - 1)}, VALUE, "bias"),
    "bias of rank 2": ({"bias": torch.randn(V, 1)}, VALUE, "bias"),
    "bias is a number": ({"bias": 0.5}, TYPE, "bias.*float"),
    "budget of zero": ({"memory_budget": 0}, VALUE, "memory_budget"),
    "negative budget": ({"memory_budget": -5}, VALUE, "memory_budget"),
    "budget is a float": ({"memory_budget": 1e6}, TYPE, "memory_budget.*float"),
    "budget is a bool": ({"memory_budget": True}, TYPE, "memory_budget.*bool"),
    "budget is text": ({"memory_budget": "80M"}, TYPE, "memory_budget.*str"),
}
TRAINED = torch.randn(V, D, requires_grad=True)
HOOKED = torch.randn(V, D, requires_grad=True)
HOOKED.register_post_accumulate_grad_hook(lambda _: None)


def buffer(into: Any, weight: Tensor = TRAINED) -> dict[str, Any]:
    return {"weight": weight, "accumulate_into": into}


ZEROS, INTO = torch.zeros(V, D), "accumulate_into.*"
HEAD_ROWS |= {
    "buffer is a flag": (buffer(True), TYPE, INTO + "bool"),
    "buffer of another shape": (buffer(torch.zeros(D, V)), VALUE, INTO + "shape"),
    "buffer of another dtype": (buffer(ZEROS.bfloat16()), TYPE, INTO + "bfloat16"),
    "buffer elsewhere": (buffer(ZEROS.to("meta")), VALUE, INTO + "meta"),
    "buffer is the weight": (buffer(TRAINED), VALUE, INTO + "requires a gradient"),
    "buffer of a frozen weight": (buffer(ZEROS, ZEROS), VALUE, INTO + "frozen"),
    "buffer of a cast": (buffer(ZEROS, TRAINED * 1), VALUE, INTO + "pass the parameter"),
    "buffer beside a hook": (buffer(ZEROS, HOOKED), VALUE, "hooks.*miss.*accumulate_into"),
}
LOW, UP = good()["hidden"][..., :2] * 1, torch.zeros(V, 2)
PAIR = "low_rank.*"
HEAD_ROWS |= {
    "low rank is a tensor": ({"low_rank": UP}, TYPE, PAIR + "pair.*Tensor"),
    "low rank of three": ({"low_rank": (LOW, UP, UP)}, TYPE, PAIR + "pair"),
    "low rank of a list": ({"low_rank": ([1.0], UP)}, TYPE, PAIR + "low.*list"),
    "low rank of other rows": ({"low_rank": (LOW[:-1], UP)}, VALUE, PAIR + "low.*shape"),
    "low rank transposed": ({"low_rank": (LOW, UP.T)}, VALUE, PAIR + "up.*shape"),
    "low rank of two ranks": ({"low_rank": (LOW, UP[:, :1])}, VALUE, PAIR + "up.*one r"),
    "low rank in float64": ({"low_rank": (LOW.double(), UP)}, TYPE, PAIR + "low.*float64"),
    "low rank in half": ({"low_rank": (LOW, UP.half())}, TYPE, PAIR + "up.*float16"),
    "low rank elsewhere": ({"low_rank": (LOW, UP.to("meta"))}, VALUE, "up is on meta"),
    "low rank beside a buffer": (
        {**buffer(ZEROS), "low_rank": (LOW, UP)},
        VALUE,
        "accumulate_into.*low_rank",
    ),
}
for operand in ("hidden", "weight", "bias"):
    tensor, place = good()[operand], f"{operand}.*meta" + "|on meta" * (operand == "hidden")
    HEAD_ROWS |= {
        f"{operand} of integers": ({operand: tensor.long()}, TYPE, f"{operand}.*int64"),
        f"{operand} float64": ({operand: tensor.double()}, TYPE, f"{operand}.*float64"),
        f"{operand} elsewhere": ({operand: tensor.to("meta")}, VALUE, place),
    }
    if operand != "bias":
        HEAD_ROWS[f"{operand} sparse"] = ({operand: tensor.to_sparse()}, TYPE, f"{operand}.*dense")
HEAD_ROWS["labels elsewhere"] = ({"labels": torch.arange(N).to("meta")}, VALUE, "labels.*meta")
SCALING_ROWS: dict[str, Row] = {
    f"{name} is {value!r}": ({name: value}, error, name)
    for name in ("temperature", "softcap", "logit_scale")
    for value, error in (
        (0.0, VALUE),
        (-1.0, VALUE),
        (NAN, VALUE),
        (INF, VALUE),
        ("1", TYPE),
        (True, TYPE),
        (torch.tensor(1.0), TYPE),
    )
}
SCALING_ROWS |= {
    "temperature is None": ({"temperature": None}, TYPE, "temperature"),
    "logit_scale is None": ({"logit_scale": None}, TYPE, "logit_scale"),
    "unknown backend": ({"backend": "fast"}, VALUE, "backend.*fast"),
    "backend of another device": ({"backend": "CPU"}, VALUE, "backend.*CPU"),
    "tp_group is a number": ({"tp_group": 2}, TYPE, "tp_group.*process group"),
}
MASK_ROWS: dict[str, Row] = {
    "entropy_grad is text": ({"entropy_grad": "yes"}, TYPE, "entropy_grad.*bool"),
    "mask of integers": (
        {"mask": torch.ones(N, dtype=torch.int64)},
        TYPE,
        r"mask.*int64.*bool\(\)",
    ),
    "mask of floats": ({"mask": torch.ones(N)}, TYPE, "mask.*float32"),
    "mask too short": ({"mask": torch.ones(N - 1, dtype=torch.bool)}, VALUE, "mask"),
    "mask is a list": ({"mask": [True] * N}, TYPE, "mask.*list"),
    "mask elsewhere": (
        {"mask": torch.ones(N, dtype=torch.bool, device="meta")},
        VALUE,
        "mask.*meta",
    ),
}
LABEL_VALUES = [V, V + 3, -1, -7, 2**31, 2**31 + 1, -(2**63), 2**63 - 1]


def with_label(value: int) -> Tensor:
    labels = torch.arange(N)
    labels[3] = value
    return labels


LABEL_ROWS: dict[str, Row] = {
    f"a label of {value}": ({"labels": with_label(value)}, VALUE, rf"labels\[3\] = {value} ")
    for value in LABEL_VALUES
}
LOGITS_ROWS: dict[str, Row] = {
    "logits is None": ({"logits": None}, TYPE, "logits"),
    "logits of integers": ({"logits": torch.ones(N, V, dtype=torch.int64)}, TYPE, "logits.*int64"),
    "logits of rank 1": ({"logits": torch.randn(V)}, VALUE, "logits"),
    "logits without classes": ({"logits": torch.randn(N, 0)}, VALUE, "logits"),
    "logits sparse": ({"logits": torch.randn(N, V).to_sparse()}, TYPE, "logits.*dense"),
    "logits float8": ({"logits": torch.ones(N, V).to(torch.float8_e5m2)}, TYPE, "logits.*float8"),
    "cpu rows in float64": (
        {"logits": torch.randn(N, V).double(), "backend": "cpu"},
        VALUE,
        "backend='cpu'.*float64",
    ),
    "a number for inplace": ({"inplace": 1}, TYPE, "inplace.*bool"),
    "expanded logits in place": (
        {"logits": torch.randn(1, V).expand(N, V), "inplace": True},
        VALUE,
        "inplace.*expanded",
    ),
    "ignored labels": ({"labels": torch.full((N,), -100)}, VALUE, r"labels\[0\] = -100 "),
    **{name: row for name, row in HEAD_ROWS.items() if name.startswith("labels")},
}


def reduced(logps: Tensor, seq: lk.Sequences) -> Tensor:
    return -logps.sum()


def no_seq(logps: Tensor) -> Tensor:
    return -logps


def starred(logps: Tensor, seq: lk.Sequences, *more: Tensor) -> Tensor:
    return -seq.sum(logps)


def ambiguous(logps: Tensor, extra: Tensor, seq: lk.Sequences) -> Tensor:
    return -seq.sum(logps * extra)


def needs_rewards(logps: Tensor, rewards: PerSequence, seq: lk.Sequences) -> Tensor:
    return -rewards * seq.sum(logps)


def nan_at(shape: int, index: int) -> Tensor:
    t = torch.ones(shape)
    t[index] = NAN
    return t


LOSS_ROWS: dict[str, Row] = {
    "objective is text": ({"objective": "a_lol"}, TYPE, "objective"),
    "objective is None": ({"objective": None}, TYPE, "objective"),
    "objective without seq": ({"objective": no_seq}, TYPE, "no_seq.*logps and seq"),
    "objective with *args": ({"objective": starred}, TYPE, "starred"),
    "seq is a list": ({"seq": [4, 2]}, TYPE, "seq.*list"),
    "seq is lengths": ({"seq": torch.tensor([4, 2])}, TYPE, "seq.*Tensor"),
    "seq of another batch": ({"seq": lk.Sequences.from_lengths([4, 3])}, VALUE, "hidden.*7"),
    "seq elsewhere": (
        {"seq": lk.Sequences.from_lengths([4, 2]).to("meta")},
        VALUE,
        "seq is on meta",
    ),
    "unknown reduction": ({"reduction": "mean"}, VALUE, "reduction.*mean"),
    "reduction none": ({"reduction": "none"}, VALUE, "reduction.*none"),
    "an unknown option": ({"clipp": 0.9}, TYPE, "clipp.*ref_logps"),
    "another objective's input": ({"rewards": torch.ones(2)}, TYPE, "rewards"),
    "ref_logps missing": ({"ref_logps": ...}, TYPE, "ref_logps is missing"),
    "advantages missing": ({"advantages": ...}, TYPE, "advantages is missing"),
    "ref_logps per sequence": ({"ref_logps": torch.zeros(2)}, VALUE, r"ref_logps.*\(6,\).*\(2,\)"),
    "advantages per token": ({"advantages": torch.zeros(N)}, VALUE, r"advantages.*\(2,\).*\(6,\)"),
    "advantages of rank 2": ({"advantages": torch.zeros(2, 1)}, VALUE, "advantages"),
    "advantages a list": ({"advantages": [1.0, 2.0]}, TYPE, "advantages.*list"),
    "advantages bool": ({"advantages": torch.ones(2, dtype=torch.bool)}, TYPE, "advantages.*bool"),
    "advantages complex": ({"advantages": torch.ones(2) * 1j}, TYPE, "advantages.*complex"),
    "advantages elsewhere": (
        {"advantages": torch.ones(2, device="meta")},
        VALUE,
        "advantages.*meta",
    ),
    "advantages nan": ({"advantages": nan_at(2, 1)}, VALUE, r"advantages\[1\] = nan"),
    "advantages inf": ({"advantages": torch.tensor([1.0, INF])}, VALUE, r"advantages\[1\] = inf"),
    "ref_logps nan": ({"ref_logps": nan_at(N, 4)}, VALUE, r"ref_logps\[4\] = nan"),
    "ref_logps -inf": ({"ref_logps": torch.full((N,), -INF)}, VALUE, r"ref_logps\[0\] = -inf"),
    "ref_logps positive": ({"ref_logps": torch.ones(N)}, VALUE, "ref_logps must hold log-probs"),
    "clip misspelt": ({"clp": 0.2}, TYPE, r"clp is not an input.*did you mean clip\?"),
    "clip of zero": ({"clip": 0.0}, VALUE, "clip.*None.*0.0"),
    "clip of 0": ({"clip": 0}, VALUE, "clip"),
    "clip negative": ({"clip": -0.1}, VALUE, "clip"),
    "clip nan": ({"clip": NAN}, VALUE, "clip"),
    "clip inf": ({"clip": INF}, VALUE, "clip.*finite"),
    "clip text": ({"clip": "0.9"}, VALUE, "clip"),
    "clip True": ({"clip": True}, VALUE, "clip"),
    "an ignored label": ({"labels": with_label(-100)}, VALUE, r"labels\[3\] = -100 "),
    "clip a list": ({"clip": [0.9]}, VALUE, "clip"),
    "clip a tensor": ({"clip": torch.tensor([0.9])}, VALUE, "clip"),
}
OTHER_LOSSES: dict[str, tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = {
    "beta nan": (objectives.a_lol_kl, {"beta": NAN}, VALUE, "beta"),
    "beta inf": (objectives.a_lol_kl, {"beta": INF}, VALUE, "beta"),
    "beta text": (objectives.a_lol_kl, {"beta": "0.1"}, VALUE, "beta"),
    "floor zero": (objectives.r_gold, {"floor": 0.0}, VALUE, "floor"),
    "floor above one": (objectives.r_gold, {"floor": 1.5}, VALUE, "floor"),
    "floor nan": (objectives.r_gold, {"floor": NAN}, VALUE, "floor"),
    "an ambiguous input": (
        ambiguous,
        {"seq": lk.Sequences.from_lengths([2, 0, 1, 1, 1, 1]), "extra": torch.ones(N)},
        VALUE,
        "extra.*PerToken or PerSequence",
    ),
    "an input of no shape": (ambiguous, {"extra": torch.ones(5)}, VALUE, "extra"),
    "a missing plain input": (needs_rewards, {"rewards": ...}, TYPE, "rewards is missing"),
}


def rows() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any], type[Exception], str]]:
    for name, (change, error, words) in {
        **HEAD_ROWS,
        **SCALING_ROWS,
        **MASK_ROWS,
        **LABEL_ROWS,
    }.items():
        yield f"linear_logprob: {name}", lk.linear_logprob, {**good(), **change}, error, words
    for name, (change, error, words) in {**SCALING_ROWS, **LABEL_ROWS, **LOGITS_ROWS}.items():
        yield f"logprob: {name}", lk.logprob, {**good_logits(), **change}, error, words
    for name, (change, error, words) in {
        **HEAD_ROWS,
        **SCALING_ROWS,
        **LABEL_ROWS,
        **LOSS_ROWS,
    }.items():
        yield f"linear_loss: {name}", lk.linear_loss, {**good_loss(), **change}, error, words
    for name, (objective, change, error, words) in OTHER_LOSSES.items():
        needed = lk.side_inputs(objective)
        base = {**good_loss(), "objective": objective, "rewards": torch.ones(2)}
        kept = {
            k: v
            for k, v in base.items()
            if k not in ("ref_logps", "advantages", "rewards") or k in needed
        }
        yield f"linear_loss: {name}", lk.linear_loss, {**kept, **change}, error, words


BAD = list(rows())


def test_the_table_is_large_and_the_good_arguments_work(spy: Spy) -> None:
    assert len(BAD) >= 120
    assert bool(lk.linear_logprob(**good()).logps.isfinite().all())
    assert bool(lk.logprob(**good_logits()).logps.isfinite().all())
    assert bool(lk.linear_loss(**good_loss()).isfinite())
    assert spy.launches >= 4  # the spy sees launches
    named = {k for _, _, arguments, _, _ in BAD for k in arguments}
    for function in (lk.linear_logprob, lk.logprob, lk.linear_loss):
        parameters = set(inspect.signature(function).parameters) - {"return_outputs", "side"}
        assert parameters <= named


@pytest.mark.parametrize(
    ("name", "function", "arguments", "error", "words"), BAD, ids=[b[0] for b in BAD]
)
def test_bad_input_is_named_before_any_launch(
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    error: type[Exception],
    words: str,
    spy: Spy,
) -> None:
    arguments = {k: v for k, v in arguments.items() if v is not ...}
    with pytest.raises(error, match=f"(?s){words}") as caught:
        function(**arguments)
    assert type(caught.value) is error  # a ValueError or a TypeError, no subclass by accident
    assert spy.launches == 0


# --- the smaller public functions -----------------------------------------------------------------

SEQ = lk.Sequences.from_lengths([4, 2])
S = lk.Sequences
SMALL: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "mask is a list": (lambda: S.from_mask([[True]]), TYPE, "mask.*list"),
    "mask of rank 1": (lambda: S.from_mask(torch.ones(3, dtype=torch.bool)), VALUE, "mask"),
    "mask of floats": (lambda: S.from_mask(torch.ones(2, 3)), TYPE, r"mask.*bool\(\)"),
    "mask of other numbers": (lambda: S.from_mask(torch.full((2, 3), 2)), VALUE, "mask.*0 and 1"),
    "lengths negative": (lambda: S.from_lengths([3, -1]), VALUE, "lengths.*-1"),
    "lengths of floats": (lambda: S.from_lengths(torch.ones(3)), TYPE, "lengths.*float32"),
    "lengths of rank 2": (lambda: S.from_lengths(torch.ones(2, 2).long()), VALUE, "lengths"),
    "lengths bool": (lambda: S.from_lengths(torch.ones(2).bool()), TYPE, "lengths.*bool"),
    "cu_seqlens falling": (lambda: S.from_cu_seqlens([0, 4, 3]), VALUE, "cu_seqlens"),
    "cu_seqlens from one": (lambda: S.from_cu_seqlens([1, 4]), VALUE, "cu_seqlens"),
    "cu_seqlens empty": (lambda: S.from_cu_seqlens([]), VALUE, "cu_seqlens"),
    "cu_seqlens of floats": (lambda: S.from_cu_seqlens(torch.zeros(2)), TYPE, "cu_seqlens"),
    "group of zero": (lambda: S.from_lengths([1, 2], group_size=0), VALUE, "group_size.*0"),
    "group of 1.0": (lambda: S.from_lengths([1, 2], group_size=1.0), VALUE, "group_size"),
    "group is a bool": (lambda: S.from_lengths([1, 2], group_size=True), VALUE, "group_size"),
    "group does not divide": (lambda: S.from_lengths([1, 2, 3], group_size=2), VALUE, "group_size"),
    "totals negative": (lambda: SEQ.with_totals(num_sequences=-1), VALUE, "total_sequences.*-1"),
    "totals nan": (lambda: SEQ.with_totals(num_tokens=NAN), VALUE, "total_tokens"),
    "totals inf": (lambda: SEQ.with_totals(num_tokens=INF), VALUE, "total_tokens"),
    "sum of another length": (lambda: SEQ.sum(torch.ones(7)), VALUE, r"\(6,\)"),
    "sum of rank 2": (lambda: SEQ.sum(torch.ones(6, 1)), VALUE, r"\(6,\)"),
    "sum of a list": (lambda: SEQ.sum([1.0] * 6), TYPE, "tensor"),
    "mean of another length": (lambda: SEQ.mean(torch.ones(5)), VALUE, r"\(6,\)"),
    "expand of tokens": (lambda: SEQ.expand(torch.ones(6)), VALUE, r"\(2,\)"),
    "pack without a mask": (lambda: SEQ.pack(torch.ones(2, 3)), VALUE, "from_mask"),
    "pack of another shape": (
        lambda: S.from_mask(torch.ones(2, 3).bool()).pack(torch.ones(3, 2)),
        VALUE,
        r"\(2, 3\)",
    ),
    "aggregate a number": (lambda: lk.aggregate(1.0, SEQ), TYPE, "loss.*float"),
    "aggregate tokens": (lambda: lk.aggregate(torch.ones(6), SEQ), VALUE, r"loss.*\(2,\)"),
    "aggregate without seq": (lambda: lk.aggregate(torch.ones(2), [4, 2]), TYPE, "seq.*list"),
    "aggregate unknown": (lambda: lk.aggregate(torch.ones(2), SEQ, "mean"), VALUE, "reduction"),
    "side_inputs of text": (lambda: lk.side_inputs("nll"), TYPE, "objective"),
    "side_inputs without seq": (lambda: lk.side_inputs(no_seq), TYPE, "no_seq"),
    "side_inputs of *args": (lambda: lk.side_inputs(starred), TYPE, "starred"),
    "loss_and_coef unknown": (
        lambda: lk.loss_and_coef(objectives.nll, torch.zeros(6), SEQ, "mean"),
        VALUE,
        "reduction",
    ),
    "loss_and_coef of a scalar": (
        lambda: lk.loss_and_coef(reduced, torch.zeros(6), SEQ),
        VALUE,
        "reduced must return",
    ),
    "use an unknown backend": (lambda: lk.use_backend("fast").__enter__(), VALUE, "backend.*fast"),
    "clip of an objective": (
        lambda: objectives.a_lol(torch.zeros(6), torch.zeros(6), torch.ones(2), SEQ, clip=0.0),
        VALUE,
        "clip",
    ),
    "objective of other tokens": (lambda: objectives.nll(torch.zeros(5), SEQ), VALUE, r"\(6,\)"),
    "LogprobHead of text": (lambda: lk.LogprobHead("lm_head"), TYPE, "linear layer"),
}


@pytest.mark.parametrize("name", list(SMALL))
def test_the_smaller_functions(name: str, spy: Spy) -> None:
    call, error, words = SMALL[name]
    with pytest.raises(error, match=words):
        call()
    assert spy.launches == 0


def test_a_buffer_under_ddp_is_refused() -> None:
    class Head(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            into, labels = torch.zeros_like(self.weight), torch.arange(N)
            return lk.linear_logprob(hidden, self.weight, labels, accumulate_into=into).logps

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*accumulate_into"):
            DistributedDataParallel(Head(D, V, bias=False))(torch.randn(N, D))
        Head(D, V, bias=False)(torch.randn(N, D)).sum().backward()
    finally:
        dist.destroy_process_group()


def test_a_sharded_parameter_is_told_from_a_whole_one() -> None:
    """A DTensor never reaches a kernel; its class is told by name, without torch.distributed."""

    class DTensor(Tensor):
        pass

    for name in ("hidden", "weight", "bias"):
        arguments = good()
        arguments[name] = arguments[name].as_subclass(DTensor)
        with pytest.raises(ValueError, match=f"{name} is a DTensor.*fuse_lm_head"):
            lk.linear_logprob(**arguments)


def test_a_backend_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "cpu", why_unavailable=lambda: "no compiler: install one")
    assert lk.available_backends()["cpu"] == "no compiler: install one"
    with pytest.raises(ValueError, match="backend='cpu' is not available: no compiler"):
        lk.linear_logprob(**{**good(), "backend": "cpu"})
    with pytest.raises(ValueError, match="not available"), lk.use_backend("cpu"):
        pass


def test_the_next_best_backend_takes_the_place_of_a_missing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen() -> str:
        return backends.pick(None, torch.device("cuda"), torch.float32)

    monkeypatch.setattr(backends, "_warned", set())
    replace(monkeypatch, "triton", why_unavailable=lambda: "no Triton: install it")
    replace(monkeypatch, "cuda", why_unavailable=lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "cuda"
    replace(monkeypatch, "cuda", why_unavailable=lambda: "no nvcc")
    with pytest.warns(RuntimeWarning, match="triton backend is missing.*no Triton"):
        assert chosen() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert chosen() == "reference"


# --- what the checks cost -------------------------------------------------------------------------


def test_the_argument_checks_cost_microseconds(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = good()
    hidden, weight, bias, labels = (arguments[k] for k in ("hidden", "weight", "bias", "labels"))
    times = []
    for _ in range(300):
        start = time.perf_counter()
        checks.head(hidden, weight, bias, labels)
        checks.scaling(0.7, 30.0, 1.0)
        checks.budget(10**6)
        checks.label_values(labels, V)
        times.append(time.perf_counter() - start)
    median = 1e6 * statistics.median(times)
    with capsys.disabled():
        print(f"\nargument checks: median {median:.0f} us (goal 50)")
    assert median < 1000  # a loaded machine is slow, but not twenty times
