"""``python -m lolkernels.info``: versions and backends, for choosing and for bug reports."""

from __future__ import annotations

import platform

import torch

from . import __version__, available_backends
from .backends import TABLE


def report() -> str:
    lines = [
        f"lolkernels {__version__}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "backends, fastest first:",
    ]
    for name, reason in available_backends().items():
        module = TABLE[name]
        where = "/".join(module.DEVICES or ("any device",))
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in module.DTYPES)
        lines.append(f"  {name:<10} {'ok' if reason is None else 'missing'}  {where}: {dtypes}")
        if reason is not None:
            lines.append(f"             {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
