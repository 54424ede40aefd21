"""What `import lolkernels` may do, and the public surface it offers."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lolkernels as lk

ROOT = Path(__file__).resolve().parents[1]

# An audit hook sees every socket the process makes, whoever makes it.
NO_NETWORK = """
import sys
def refuse(event, args):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise RuntimeError("network: " + event)
sys.addaudithook(refuse)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=300
    )


def test_the_network_guard_works() -> None:
    done = run_python(NO_NETWORK + "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert done.returncode != 0 and "network: socket." in done.stderr


def test_import_needs_no_network_and_loads_neither_transformers_nor_triton() -> None:
    done = run_python(
        NO_NETWORK
        + """
import lolkernels as lk, torch
heavy = sorted({"transformers", "triton", "datasets", "numpy.testing"} & set(sys.modules))
assert not heavy, heavy
out = lk.linear_logprob(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2]))
assert out.logps.shape == (3,) and bool((out.logps < 0).all())
heavy = sorted({"transformers", "datasets"} & set(sys.modules))
assert not heavy, heavy
"""
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_trainer_needs_no_network() -> None:
    done = run_python(NO_NETWORK + "import lolrl, lolrl.cli")
    assert done.returncode == 0, done.stderr


PUBLIC_NAMES = [
    "LinearLossOutput",
    "LogprobHead",
    "LogprobOutput",
    "Sequences",
    "aggregate",
    "available_backends",
    "check_errors",
    "fuse_lm_head",
    "linear_logprob",
    "linear_loss",
    "logprob",
    "loss_and_coef",
    "objectives",
    "side_inputs",
    "unfuse_lm_head",
    "use_backend",
]

OBJECTIVES = {
    "nll": "logps, seq",
    "wbc": "logps, rewards, seq",
    "r_gold": "logps, rewards, seq, *, floor=0.1",
    "r_lol": "logps, ref_logps, rewards, seq, *, clip=0.9",
    "a_lol": "logps, ref_logps, advantages, seq, *, clip=0.9",
    "a_lol_seq": "logps, ref_logps, advantages, seq, *, clip=0.9",
    "a_lol_ref_free": "logps, advantages, seq",
    "a_lol_kl": "logps, ref_logps, advantages, seq, *, beta=0.1",
    "r_lol_kl": "logps, ref_logps, rewards, seq, *, beta=0.1",
    "dpo": "logps, ref_logps, seq, *, beta=0.1, label_smoothing=0.0, reference_free=False",
    "ipo": "logps, ref_logps, seq, *, beta=0.1",
    "simpo": "logps, seq, *, beta=2.0, gamma=1.0",
    "pro": "logps, rewards, seq, *, sft_weight=0.05",
    "kto": "logps, ref_logps, desirable, z0, seq, *, beta=0.1, desirable_weight=1.0, "
    "undesirable_weight=1.0",
    "ppo": "logps, entropy, old_logps, advantages, values, old_values, returns, seq, *, clip=0.2, "
    "value_clip=0.2, value_coef=0.1, entropy_coef=0.01",
    "grpo": "logps, old_logps, ref_logps, advantages, seq, *, clip=0.2, clip_high=None, beta=0.04, "
    "length_normalised=True",
    "gspo": "logps, old_logps, advantages, seq, *, clip=0.0003, clip_high=0.0004",
    "psi_learning": "target_logit, ref_logps, token_rewards, target_net_lse, seq, *, c=1.0, "
    "gamma=0.99",
    "g_learning": "target_logit, token_rewards, target_net_lse, seq, *, c=1.0, gamma=0.99",
    "q_learning": "target_logit, ref_logps, token_rewards, target_net_max_logit, seq, *, c=1.0, "
    "gamma=0.99",
}

SIGNATURES = {
    "linear_logprob": "hidden, weight, labels, *, bias=None, mask=None, temperature=1.0, "
    "softcap=None, logit_scale=1.0, entropy_grad=False, backend=None, memory_budget=None, "
    "accumulate_into=None, tp_group=None, low_rank=None",
    "logprob": "logits, labels, *, temperature=1.0, softcap=None, logit_scale=1.0, backend=None, "
    "inplace=False, tp_group=None",
    "linear_loss": "objective, hidden, weight, labels, seq, *, reduction='seq-mean', bias=None, "
    "temperature=1.0, softcap=None, logit_scale=1.0, backend=None, memory_budget=None, "
    "tp_group=None, return_outputs=False, accumulate_into=None, low_rank=None, **side",
    "aggregate": "loss, seq, reduction='seq-mean'",
    "loss_and_coef": "fn, logps, seq, reduction='seq-mean', **side",
    "side_inputs": "fn",
    "fuse_lm_head": "model, *, backend=None, memory_budget=None, main_grad=False, check=True",
    "unfuse_lm_head": "model",
    "available_backends": "",
    "use_backend": "name",
}


def parameters(function: object) -> str:
    """Renders a signature without annotations."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text[1:-1]


def test_public_names_are_frozen() -> None:
    assert sorted(lk.__all__) == PUBLIC_NAMES
    for name in lk.__all__:
        assert hasattr(lk, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures_are_frozen(name: str) -> None:
    assert parameters(getattr(lk, name)) == SIGNATURES[name]


def test_objectives_are_frozen() -> None:
    registry = lk.objectives.REGISTRY
    assert {name: parameters(fn) for name, fn in registry.items()} == OBJECTIVES
    assert all(getattr(lk.objectives, name) is fn for name, fn in registry.items())


def test_every_public_name_has_a_docstring() -> None:
    for name in lk.__all__:
        value = getattr(lk, name)
        if not isinstance(value, str):
            assert inspect.getdoc(value), name
    for name in OBJECTIVES:
        assert inspect.getdoc(getattr(lk.objectives, name)), name
