"""``python -m lolkernels.info``: versions, backends, and the route of a call.

For choosing, and for bug reports. With ``--rows N --hidden D --vocab V`` (and optionally
``--dtype``, ``--device``, ``--backend``, ``--memory-budget``) it prints what a call of that shape
does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from . import __version__, available_backends, backends, gemm, memory
from .walk import takes_panels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def report() -> str:
    lines = [
        f"lolkernels {__version__}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"triton     {_version('triton')}",
    ]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{i}     {about.name}, sm_{about.major}{about.minor}, {memory}")
    lines.append("backends, first choice first:")
    for name, reason in available_backends().items():
        module = backends.TABLE[name]
        where = "/".join(module.devices or ("any device",))
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in module.dtypes)
        lines.append(f"  {name:<14} {'ok' if reason is None else 'missing'}  {where}: {dtypes}")
        if reason is not None:
            lines.append(f"                 {reason}")
    return "\n".join(lines)


def route(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    hidden: int,
    vocab: int,
    *,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> str:
    """What linear_loss, linear_logprob and scoring do for (rows, hidden) x (vocab, hidden)."""
    name = backends.pick(backend, device, torch.float32)
    record = backends.TABLE[name]
    like = torch.empty(0, hidden, dtype=dtype, device=device)
    cpu = device.type == "cpu" and record.panels
    operand = gemm.operand_dtype(like, like, panels=cpu)
    panels = takes_panels(like, like, record, operand)
    own = operand in record.gemm_dtypes
    product = "stored as they are" if operand == dtype else "converted panel by panel"
    if panels:
        width = min(memory.PANEL, vocab)
        tile = f"{min(rows, memory.tile_rows(width, 4, memory_budget))} rows x {width} columns"
    else:
        tile = f"{memory.chunk_rows(rows, vocab, memory_budget, device)} whole rows"
    kept = memory.kept_rows(vocab, hidden, operand.itemsize, memory_budget, device)
    lines = [
        f"route of ({rows}, {hidden}) x ({vocab}, {hidden}) {_name(dtype)} on {device}:",
        f"  backend         {name}",
        f"  GEMMs           {_name(operand)} operands, {product}; fp32 logits"
        + (" that its own GEMM keeps in registers" if own else ""),
        f"  tiles           {tile}",
        f"  trained head    exponentials of {min(rows, kept)} rows at a time",
        "  extra memory    beyond the inputs and the returned gradients",
    ]
    for op in ("linear_loss", "linear_logprob", "score"):
        for frozen in (False, True) if op != "score" else (True,):
            extra = memory.extra_bytes(
                op,
                num_rows=rows,
                hidden_size=hidden,
                vocab=vocab,
                hidden_bytes=dtype.itemsize,
                weight_bytes=dtype.itemsize,
                frozen_weight=frozen,
                memory_budget=memory_budget,
                device=device,
                gemm=own,
            )
            what = f"{op}{', frozen head' if frozen and op != 'score' else ''}"
            lines.append(f"    {what:<28} {extra / 2**20:8.1f} MiB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lolkernels.info", description=__doc__)
    gpu = torch.cuda.is_available()
    for flag in ("rows", "hidden", "vocab"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--backend", choices=backends.TABLE)
    parser.add_argument("--memory-budget", type=int, help="bytes of logits held at a time")
    given = parser.parse_args()
    print(report())
    shape = (given.rows, given.hidden, given.vocab)
    if any(shape) and not all(n and n > 0 for n in shape):
        parser.error("a route needs --rows, --hidden and --vocab, all > 0")
    if all(shape) and given.device.startswith("cuda") and not gpu:
        parser.error(f"--device {given.device}: torch sees no GPU")
    if all(shape):
        options = {"backend": given.backend, "memory_budget": given.memory_budget}
        try:
            print(route(torch.device(given.device), DTYPES[given.dtype], *shape, **options))
        except (ValueError, RuntimeError) as error:  # a backend or a device that is not there
            parser.error(str(error))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
