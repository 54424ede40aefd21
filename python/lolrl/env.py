"""What a bug report needs: versions, backends, device, threads. No names of machines or paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform

PACKAGES = (
    "lolkernels",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scikit-learn",
    "vaderSentiment",
    "trl",
    "deepspeed",
    "flash-attn",
)


def environment() -> dict[str, str]:
    """One entry a fact, in the order to print: package -> version or "not installed", and so on."""
    import torch

    import lolkernels as lk

    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
    }
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["gpus"] = ", ".join(gpus) or "none"
    for name, reason in lk.available_backends().items():
        facts[f"backend {name}"] = "usable" if reason is None else f"not usable: {reason}"
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def environment_text() -> str:
    """`environment()` as aligned lines, to paste into a report."""
    facts = environment()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
