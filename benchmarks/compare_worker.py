"""One version's process of compare.py: answers each line of JSON on stdin with a line on stdout.

It uses public names of lolkernels only, so that an older version can be the base.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import CLIP, Shape, make_inputs

import lolkernels as lk

Results = dict[str, torch.Tensor | None]


def build_call(op: str, inputs: Any, shape: Shape, frozen_head: bool) -> Callable[[], Results]:
    """One forward and backward (a forward for `score`); returns log-probs and gradients."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(not frozen_head)
    labels, upstream = inputs.labels, inputs.upstream
    cu = torch.arange(0, shape.tokens + 1, shape.seq_len, device=labels.device)
    seq = lk.Sequences.from_cu_seqlens(cu)
    if op == "logprob":
        with torch.no_grad():
            logits = (hidden.float() @ weight.float().T).to(hidden.dtype)
        logits.requires_grad_()

    def results(logps: torch.Tensor, **leaves: torch.Tensor) -> Results:
        found: Results = {"logps": logps.detach()}
        for name, leaf in leaves.items():
            found[name], leaf.grad = leaf.grad, None
        return found

    def linear_loss() -> Results:
        out = lk.linear_loss(
            lk.objectives.a_lol,
            hidden,
            weight,
            labels,
            seq,
            ref_logps=inputs.ref_logps,
            advantages=inputs.advantages,
            clip=CLIP,
            return_outputs=True,
        )
        out.loss.backward()
        return results(out.logps, dhidden=hidden, dweight=weight)

    def linear_logprob() -> Results:
        logps = lk.linear_logprob(hidden, weight, labels).logps
        logps.backward(upstream)
        return results(logps, dhidden=hidden, dweight=weight)

    def score() -> Results:
        with torch.no_grad():
            return results(lk.linear_logprob(hidden, weight, labels).logps)

    def logprob() -> Results:
        logps = lk.logprob(logits, labels).logps
        logps.backward(upstream)
        return results(logps, dlogits=logits)

    calls = (linear_loss, linear_logprob, score, logprob)
    return next(call for call in calls if call.__name__ == op)


class Worker:
    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.shape: Shape | None = None
        self.inputs: Any = None
        self.call: Callable[[], Results] | None = None

    def about(self) -> dict[str, Any]:
        backends = [name for name, why in lk.available_backends().items() if why is None]
        return {"file": str(Path(lk.__file__).resolve()), "backends": backends}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "case" in request:
            return self.prepare(request["case"], Path(request["folder"]))
        return {"seconds": self.time(request["repeats"])}

    def prepare(self, case: dict[str, Any], folder: Path) -> dict[str, Any]:
        shape = Shape(**case["shape"])
        self.call = None  # the last case's tensors go first
        if shape != self.shape:
            self.inputs = None
            place = {"device": self.device} if self.device.type == "cuda" else {}
            self.inputs, self.shape = make_inputs(shape, **place), shape
        self.call = build_call(case["op"], self.inputs, shape, case["frozen_head"])
        sizes = {}
        for name, tensor in self.call().items():
            if tensor is not None:
                sizes[name] = tensor.numel()
                path = folder.with_name(f"{folder.name}-{name}")
                kept = torch.from_file(str(path), shared=True, size=tensor.numel())
                kept.copy_(tensor.detach().reshape(-1))
        return {"sizes": sizes, "seconds": self.time(2)}

    def time(self, repeats: int) -> float:
        """Seconds of the median call."""
        assert self.call is not None
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            self.call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def reply(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    serve = None
    for line in sys.stdin:
        try:
            if serve is None:
                serve = Worker(**json.loads(line))
                reply(**serve.about())
            else:
                reply(**serve.answer(json.loads(line)))
        except Exception as error:  # whatever the version fails with is for the other end to show
            reply(error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


if __name__ == "__main__":
    main()
