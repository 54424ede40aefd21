"""The authors' own numbers: loss and gradients of their scripts' configurations, in float64.

``data/lolrl_golden.npz`` holds inputs (B=4 responses, T=12 positions, V=17) with the loss, d loss /
d logits and d loss / d logp that the public A-LoL code computes. Four differences are kept on
purpose, each with a test that names it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import judges
import numpy as np
import pytest
import torch
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.objectives import PerSequence, PerToken

DATA = Path(__file__).parent / "data"
ARRAYS = dict(np.load(DATA / "lolrl_golden.npz", allow_pickle=False))
ENTRIES = json.loads((DATA / "lolrl_golden.json").read_text(encoding="utf-8"))["entries"]
TOL = 1e-12

# The scripts' configuration -> our objective and its options. Their clip of 0.0 means "no clip" for
# a_lol and r_lol, which we spell None, and "weight one" for a_lol_seq: a_lol_ref_free.
# Their penalty is a switch on a_lol and r_lol; ours are the objectives a_lol_kl and r_lol_kl.
CONFIGURATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "nll": (objectives.nll, {}),
    "wbc": (objectives.wbc, {}),
    "r_gold": (objectives.r_gold, {"floor": 0.1}),
    "r_lol_clip0.9": (objectives.r_lol, {"clip": 0.9}),
    "r_lol_noclip": (objectives.r_lol, {"clip": None}),
    "r_lol_kl0.2": (objectives.r_lol_kl, {"beta": 0.2}),
    "a_lol_clip0.9": (objectives.a_lol, {"clip": 0.9}),
    "a_lol_clip0.2": (objectives.a_lol, {"clip": 0.2}),
    "a_lol_noclip": (objectives.a_lol, {"clip": None}),
    "a_lol_kl0.2": (objectives.a_lol_kl, {"beta": 0.2}),
    "a_lol_seq_clip0.9": (objectives.a_lol_seq, {"clip": 0.9}),
    "a_lol_seq_clip0.2": (objectives.a_lol_seq, {"clip": 0.2}),
    "a_lol_seq_noclip": (objectives.a_lol_seq, {"clip": None}),
    "a_lol_seq_clip0.0": (objectives.a_lol_ref_free, {}),
    "a_lol_ref_free": (objectives.a_lol_ref_free, {}),
}
KEPT_DIFFERENCES = {"hh.a_lol_ref_free.c3"}  # trains on a negative advantage; ours clamps at zero

FAMILY = {e["key"]: e for e in ENTRIES if e["source"] in ("hh", "pg")}
AGREEING = [key for key in FAMILY if key not in KEPT_DIFFERENCES]
# Triton's interpreter is slow: one case of each objective in every run, all in the exhaustive one.
KERNELS = [(backend, key) for backend in ("cpu", "cuda_host") for key in AGREEING] + [
    pytest.param("triton", key, marks=() if re.fullmatch(r"hh\..*\.c0", key) else pytest.mark.slow)
    for key in AGREEING
]


class Case:
    """One entry: its packed inputs and the expected loss and gradients of the packed rows."""

    def __init__(self, entry: dict[str, Any], order: list[int] | None = None) -> None:
        inputs, key = entry["inputs"], entry["key"]
        rows = order or list(range(ARRAYS[f"{inputs}.mask"].shape[0]))

        def read(name: str) -> Tensor:
            return torch.from_numpy(ARRAYS[name])[rows]

        self.mask = read(f"{inputs}.mask").bool()
        self.logits = read(f"{inputs}.logits")[self.mask]
        self.labels = read(f"{inputs}.labels").long()[self.mask]
        self.side: dict[str, Tensor] = {}
        for name in ("ref_logp", "old_logp"):
            if f"{inputs}.{name}" in ARRAYS:
                self.side[name + "s"] = read(f"{inputs}.{name}")[self.mask]
        if f"{inputs}.reward" in ARRAYS:
            self.side["rewards"] = read(f"{inputs}.reward")
            self.side["advantages"] = self.side["rewards"] - read(f"{inputs}.value")
        self.loss = torch.from_numpy(ARRAYS.get(f"{key}.loss", np.array(np.nan)))
        twin = entry.get("dlogits_same_as") or key
        self.dlogits = read(f"{twin}.dlogits")[self.mask]
        self.dlogp = read(f"{key}.dlogp")[self.mask]
        self.seq = lk.Sequences.from_mask(self.mask)
        assert float(read(f"{key}.dlogp")[~self.mask].abs().sum()) == 0.0

    def logps(self) -> Tensor:
        return lk.logprob(self.logits, self.labels, backend="reference").logps


def family_case(key: str) -> tuple[Case, Callable[..., Tensor], dict[str, Any]]:
    case = Case(FAMILY[key])
    objective, options = CONFIGURATIONS[FAMILY[key]["algo"]]
    needed = lk.side_inputs(objective)
    return case, objective, {k: v for k, v in case.side.items() if k in needed} | options


def close(got: Tensor, want: Tensor, tol: float = TOL) -> bool:
    """Within ``tol`` of the largest entry, and right to the last canary."""

    def judge(x: Tensor) -> list[str]:
        off = float((x - want).abs().max()) / max(1e-300, float(want.abs().max()))
        return [] if off <= tol else [f"off by {off:.1e}"]

    if float(want.abs().max()) < 1e-15:  # a sum that cancels
        return float(got.detach().abs().max()) < 1e-15
    flat = got.detach().reshape(-1, got.shape[-1]) if got.dim() else got.detach().reshape(1)
    return judges.accept(lambda x: judge(x.reshape(want.shape)), flat) >= 2


def test_the_file_holds_four_cases_of_each_configuration() -> None:
    assert len(FAMILY) == 4 * (15 + 11)
    assert {e["algo"] for e in FAMILY.values()} == set(CONFIGURATIONS)
    for key, entry in FAMILY.items():
        clip = entry["params"]["ppo_clip"]
        _, options = CONFIGURATIONS[entry["algo"]]
        if "clip" in options:
            assert options["clip"] == (clip or None), key


@pytest.mark.parametrize("key", AGREEING)
def test_log_probs_then_the_objective_and_the_fused_loss(key: str) -> None:
    """The loss, its gradient, and the coefficient, which is the scripts' gradient of log-probs."""
    case, objective, side = family_case(key)
    logits = case.logits.clone().requires_grad_()
    logps = lk.logprob(logits, case.labels, backend="reference").logps
    loss = lk.aggregate(objective(logps=logps, seq=case.seq, **side), case.seq, "seq-mean")
    dlogits, dlogp = torch.autograd.grad(loss, (logits, logps))
    assert close(loss, case.loss) and close(dlogits, case.dlogits) and close(dlogp, case.dlogp)
    loss, coef, seq_loss = lk.loss_and_coef(objective, logps.detach(), case.seq, **side)
    assert seq_loss.shape == (4,) and close(loss, case.loss) and close(coef, case.dlogp)
    head = (logits, torch.eye(17, dtype=torch.float64), case.labels, case.seq)
    for budget in (None, 5 * 17 * 8):  # one block, and five rows each
        options = {"backend": "reference", "memory_budget": budget}
        loss = lk.linear_loss(objective, *head, **options, **side)
        assert close(loss, case.loss)
        assert close(torch.autograd.grad(loss, logits)[0], case.dlogits)


@pytest.mark.parametrize(("backend", "key"), KERNELS)
def test_float32_kernels(backend: str, key: str) -> None:
    """The kernels' rows within the float32 tolerance of the authors' float64 numbers."""
    case, objective, side = family_case(key)
    seq = case.seq
    side = {k: v.float() if isinstance(v, Tensor) else v for k, v in side.items()}
    outcomes = []
    hidden = case.logits.float().requires_grad_()
    loss = lk.linear_loss(
        objective, hidden, torch.eye(hidden.shape[1]), case.labels, seq, backend=backend, **side
    )
    outcomes.append((loss, torch.autograd.grad(loss, hidden)[0]))
    logps = lk.logprob(hidden, case.labels, backend=backend).logps
    loss = lk.aggregate(objective(logps=logps, seq=seq, **side), seq)
    outcomes.append((loss, torch.autograd.grad(loss, hidden)[0]))
    baseline = torch.log_softmax(hidden, -1).gather(-1, case.labels[:, None]).squeeze(-1)
    eager_loss = lk.aggregate(objective(logps=baseline, seq=seq, **side), seq)
    (eager,) = torch.autograd.grad(eager_loss, hidden)
    for loss, grad in outcomes:
        assert abs(loss.item() - case.loss.item()) <= 2e-5 * max(1.0, abs(float(case.loss)))
        judges.accept_gradient(grad, eager, case.dlogits)


# --- the differences kept on purpose --------------------------------------------------------------


def test_a_lol_ref_free_clamps_the_advantage_where_one_script_does_not() -> None:
    """c3 holds a negative advantage: one script un-learns it, its twin and ours drop it."""
    case, objective, side = family_case("hh.a_lol_ref_free.c3")
    seq = case.seq
    negative = side["advantages"] < 0
    assert negative.tolist() == [False, True, False, False]
    logps = case.logps()
    loss, coef, _ = lk.loss_and_coef(objective, logps, seq, **side)
    assert not torch.isclose(loss, case.loss, rtol=1e-3, atol=0)
    dropped = seq.expand(negative)
    assert bool((coef[dropped] == 0).all()) and bool((case.dlogp[dropped] > 0).all())
    assert close(coef[~dropped], case.dlogp[~dropped])
    twin = Case(FAMILY["pg.a_lol_ref_free.c3"])
    assert close(loss, twin.loss) and close(coef, twin.dlogp)


@pytest.mark.parametrize("index", [0, 2, 3, 5])
def test_a_lol_seq_with_their_clip_of_zero_is_a_lol_ref_free(index: int) -> None:
    """[1 - 0, 1 + 0] clamps every weight to one; ours refuses clip=0 and names a_lol_ref_free."""
    key = f"hh.a_lol_seq_clip0.0.c{index}"
    case, _, _ = family_case(key)
    seq = case.seq
    logps = case.logps()
    side = {"ref_logps": case.side["ref_logps"], "advantages": case.side["advantages"]}
    with pytest.raises(ValueError, match="a_lol_ref_free"):
        objectives.a_lol_seq(logps, seq=seq, clip=0.0, **side)
    loss, coef, _ = lk.loss_and_coef(
        objectives.a_lol_ref_free, logps, seq, advantages=side["advantages"]
    )
    assert close(loss, case.loss) and close(coef, case.dlogp)


@pytest.mark.parametrize("algorithm", ["a_lol", "r_lol"])
def test_their_clip_of_zero_is_our_none(algorithm: str) -> None:
    objective = getattr(objectives, algorithm)
    compared = 0
    for index in (0, 2, 3, 5):
        case, _, side = family_case(f"hh.{algorithm}_noclip.c{index}")
        assert FAMILY[f"hh.{algorithm}_noclip.c{index}"]["params"]["ppo_clip"] == 0.0
        assert side.pop("clip") is None
        seq = case.seq
        logps = case.logps()
        with pytest.raises(ValueError, match="clip must be None"):
            objective(logps=logps, seq=seq, clip=0.0, **side)
        _, unclipped, _ = lk.loss_and_coef(objective, logps, seq, clip=None, **side)
        _, clipped, _ = lk.loss_and_coef(objective, logps, seq, clip=0.9, **side)
        assert close(unclipped, case.dlogp)
        compared += int(not torch.equal(clipped, unclipped))
    assert compared >= 1  # the cases tell clipped from unclipped


@pytest.mark.parametrize("algorithm", ["a_lol", "r_lol"])
def test_their_penalty_switch_is_an_objective_of_its_own(algorithm: str) -> None:
    objective = getattr(objectives, f"{algorithm}_kl")
    for index in (0, 2, 3, 5):
        entry = FAMILY[f"hh.{algorithm}_kl0.2.c{index}"]
        assert entry["params"] == {"algorithm": algorithm, "ppo_clip": 0.0, "kl_beta": 0.2}
        case, used, side = family_case(entry["key"])
        assert used is objective and side.pop("beta") == 0.2
        seq = case.seq
        logps = case.logps()
        loss, coef, _ = lk.loss_and_coef(objective, logps, seq, beta=0.2, **side)
        assert close(loss, case.loss) and close(coef, case.dlogp)
        _, unpenalised, _ = lk.loss_and_coef(objective, logps, seq, beta=0.0, **side)
        assert torch.allclose(coef - unpenalised, torch.full_like(coef, 0.2 / 4), rtol=1e-10)


# --- pairs, rankings, PPO -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e["source"] == "dpo"], ids=lambda e: e["key"]
)
def test_dpo_on_pairs(entry: dict[str, Any]) -> None:
    case = Case(entry, order=[0, 2, 1, 3])  # the file has the chosen first, then the rejected
    seq = lk.Sequences.from_mask(case.mask, group_size=2)
    for held in (None, 3 * 17 * 8):
        hidden = case.logits.clone().requires_grad_()
        loss = lk.linear_loss(
            objectives.dpo,
            hidden,
            torch.eye(17, dtype=torch.float64),
            case.labels,
            seq,
            backend="reference",
            memory_budget=held,
            ref_logps=case.side["ref_logps"],
            **entry["params"],
        )
        loss.backward()
        assert close(loss, case.loss)
        assert close(hidden.grad, case.dlogits)


@pytest.mark.parametrize(
    "entry",
    # In c5 the script's ratio threshold is passed, and it drops the whole batch.
    [e for e in ENTRIES if e["algo"] == "ppo" and e["key"] != "ppo.c5"],
    ids=lambda e: e["key"],
)
def test_ppo_with_its_value_loss(entry: dict[str, Any]) -> None:
    case, key, params = Case(entry), entry["key"], entry["params"]
    seq = case.seq
    logits = case.logits.clone().requires_grad_()
    out = lk.logprob(logits, case.labels, backend="reference")

    def read(name: str) -> Tensor:
        return torch.from_numpy(ARRAYS[f"{key}.{name}"])[case.mask]

    def loss(values: Tensor, value_coef: float) -> Tensor:
        losses = objectives.ppo(
            out.logps, out.entropy, case.side["old_logps"], read("advantages"), values,
            read("values"), read("returns"), seq, entropy_coef=0.0, value_coef=value_coef,
            clip=params["cliprange"], value_clip=params["cliprange_value"],
        )  # fmt: skip
        return lk.aggregate(losses, seq, "token-mean")

    values = read("vpreds").requires_grad_()
    policy, total = loss(values, 0.0), loss(values, params["vf_coef"])
    assert close(policy, torch.from_numpy(ARRAYS[f"{key}.loss_policy"]))
    value = torch.from_numpy(ARRAYS[f"{key}.loss_value"])  # with its coefficient
    assert close(total, policy.detach() + value)
    dlogits, dvalues = torch.autograd.grad(total, (logits, values))
    assert close(dlogits, case.dlogits)
    assert close(dvalues, read("dvpreds"))


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e["algo"] == "pro"], ids=lambda e: e["key"]
)
def test_pro_on_ranked_lists(entry: dict[str, Any]) -> None:
    """The script's mask is one position late, so that a first response token is never scored.

    It adds 1e-10 to each sum of exponentials, and so does this test: the rest agrees to the digit.
    """
    key, eps = entry["key"], entry["params"]["eps"]
    _, ranked, length = ARRAYS[f"{key}.ids"].shape
    assert ranked == 2 and ARRAYS[f"{key}.sft_index"].tolist() == [0, 0]
    scored = (ARRAYS[f"{key}.attention_mask"] > 0) & (ARRAYS[f"{key}.prefix_mask"] == 0)
    mask = torch.from_numpy(scored).view(-1, length)[:, :-1]
    ids = torch.from_numpy(ARRAYS[f"{key}.ids"]).long().view(-1, length)
    logits = torch.from_numpy(ARRAYS[f"{key}.logits"]).view(-1, length, 17)

    def theirs(logps: PerToken, rewards: PerSequence, seq: lk.Sequences) -> Tensor:
        tau = rewards.view(-1, 2) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        total = (seq.mean(logps).view(-1, 2) * tau[:, None]).exp().sum(1)
        weight = entry["params"]["sft_weight"]
        return objectives.pro(logps, rewards, seq, sft_weight=weight) + (eps / total).log1p()

    hidden = logits[:, :-1][mask].requires_grad_()
    call = (hidden, torch.eye(17, dtype=torch.float64), ids[:, 1:][mask])
    seq = lk.Sequences.from_mask(mask, group_size=ranked)
    rewards = torch.from_numpy(ARRAYS[f"{key}.rewards"]).view(-1)
    want = torch.from_numpy(ARRAYS[f"{key}.dlogits"]).view(-1, length, 17)[:, :-1][mask]
    for objective, tol in ((theirs, TOL), (objectives.pro, 1e-7)):
        loss = lk.linear_loss(objective, *call, seq, backend="reference", rewards=rewards)
        (grad,) = torch.autograd.grad(loss, hidden)
        assert close(loss, torch.from_numpy(ARRAYS[f"{key}.loss"]), tol)
        assert close(grad, want, tol)
