"""The table of backends and the choice among them: a pure function of device and dtype.

A backend is a record of row functions (:class:`lolkernels.backends.contract.Backend`); the
reference backend defines what they compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cpu, cuda, cuda_gemm, reference, triton
from .contract import Backend

# The first that fits is taken; the reference always fits: what follows it is taken by name only.
# Adding a backend is one module and one entry here.
TABLE: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        *(cpu.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND),
        *cuda_gemm.BACKENDS,
    )
}

_forced: list[str] = []
_warned: set[str] = set()


def available_backends() -> dict[str, str | None]:
    """Every backend's name -> None where it can be used, otherwise why not and what to do."""
    return {name: backend.why_unavailable() for name, backend in TABLE.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every call without a ``backend`` argument runs on this backend.

    Raises:
        ValueError: no such backend, or it is not available (the text says why).
    """
    check_backend(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def check_backend(name: str) -> None:
    if name not in TABLE:
        raise ValueError(f"backend must be one of {', '.join(TABLE)}; got {name!r}")
    reason = _reason(name)
    if reason is not None:
        raise ValueError(f"backend={name!r} is not available: {reason}")


def pick(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of a call: the one named, else the one in force, else the first that fits."""
    name = name if name is not None else (_forced[-1] if _forced else None)
    if name is not None:
        check_backend(name)
        backend = TABLE[name]
        if not backend.fits(device, dtype):
            raise ValueError(
                f"backend={name!r} does not take {dtype} on {device.type}; it takes "
                f"{_names(backend.dtypes)} on {', '.join(backend.devices or ('any device',))}. "
                "Use backend='reference' or convert the tensors."
            )
        return name
    missing: tuple[str, str] | None = None  # the best that would fit, and why it is not there
    for candidate, backend in TABLE.items():
        if not backend.fits(device, dtype):
            continue
        reason = _reason(candidate)
        if reason is not None:
            missing = missing or (candidate, reason)
            continue
        if candidate == "reference" and missing and not torch.compiler.is_compiling():
            best, reason = missing
            if best not in _warned:
                _warned.add(best)
                warnings.warn(
                    f"lolkernels: the {best} backend is missing and the slow reference backend is "
                    f"used instead: {reason}",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return candidate
    raise ValueError(f"no backend takes {dtype} on {device.type}")


def _reason(name: str) -> str | None:
    return TABLE[name].why_unavailable()


# It looks at files, which torch.compile cannot trace: what torch.compiler.assume_constant_result
# sets, without its import of the whole compiler.
_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "/".join(str(d).removeprefix("torch.") for d in dtypes)
