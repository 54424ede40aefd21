"""What an objective declares: the statistics and inputs it names, its traits, its place by name."""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from torch import Tensor

PerToken = Annotated[Tensor, "token"]  # (N,)
PerSequence = Annotated[Tensor, "sequence"]  # (S,)

Objective = Callable[..., Any]

STATISTICS = ("logps", "lse", "entropy", "target_logit", "max_logit")
DIFFERENTIABLE = STATISTICS[:4]

NO_RATIO, SEQUENCE_RATIO, TOKEN_RATIO = 0, 1, 2


class Family(NamedTuple):
    """A loss of the A-LoL family, as the fused step takes it.

    loss_s = -weight_s sum_t w_t l_t + beta sum_t (l_t - l^r_t) and d loss_s / d l_t = -(weight_s
    w_t - beta), with w_t one, the clipped sequence ratio, or the clipped token ratio.
    """

    weight: Tensor  # (S,)
    ratio: int = NO_RATIO
    log_low: float = -math.inf
    log_high: float = math.inf
    beta: float = 0.0
    uses_ref: bool = True


class Traits(NamedTuple):
    """What an objective declares. Without a declaration nothing is taken for granted.

    ``lolkernels.testing.check_objective`` tells whether ``token_local`` and ``family`` are true.
    """

    token_local: bool = False  # the gradient at token t depends on token t alone: may be cut
    family: Callable[..., Family] | None = None  # (seq=, side inputs, options) -> Family
    metrics: tuple[str, ...] = ()  # of the family, see ``family_report``
    positive_only: bool = False  # the recipe trains on rows with an advantage > 0
    sampling: str = "uniform"  # or "advantage": the recipe draws in proportion to the advantage


FAMILY_METRICS = ("log_ratio", "clipped", "unlearned")

REGISTRY: dict[str, Objective] = {}


def objective(**declared: Any) -> Callable[[Objective], Objective]:
    """Register an objective under its function's name, with what it declares (:class:`Traits`).

    Raises:
        TypeError: a name that is not a trait.
        ValueError: a trait with an impossible value, or a name that another function has.
    """
    mark = Traits(**declared)
    if mark.sampling not in ("uniform", "advantage"):
        raise ValueError(f"sampling must be uniform or advantage, got {mark.sampling!r}")
    unknown = sorted(set(mark.metrics) - set(FAMILY_METRICS))
    if unknown or (mark.metrics and mark.family is None):
        raise ValueError(
            f"metrics of a family are {', '.join(FAMILY_METRICS)}, got {mark.metrics!r}; another "
            "objective returns its own, as (loss, {name: (G,) tensor})"
        )

    def register(fn: Objective) -> Objective:
        name = fn.__name__
        other = REGISTRY.get(name, fn)
        if (other.__module__, other.__qualname__) != (fn.__module__, fn.__qualname__):
            raise ValueError(
                f"objective {name} exists already, in {other.__module__}: choose another name"
            )
        side_inputs(fn)  # a signature that cannot be used is an error here
        fn.traits = mark  # type: ignore[attr-defined]
        REGISTRY[name] = fn
        return fn

    return register


def traits(fn: Objective) -> Traits:
    """What ``fn`` declares; a ``functools.partial`` that binds keywords keeps its function's."""
    while isinstance(fn, functools.partial) and not fn.args:
        fn = fn.func
    found = getattr(fn, "traits", None)
    return found if isinstance(found, Traits) else Traits()


def statistics(fn: Objective) -> tuple[str, ...]:
    """Which of ``STATISTICS`` an objective names among its parameters, in that order.

    Raises:
        TypeError: as :func:`side_inputs`.
    """
    return _described(fn)[0]


def side_inputs(fn: Objective) -> dict[str, str]:
    """The inputs an objective needs beyond row statistics and ``seq``, from its signature.

    Returns:
        name -> "token" (an (N,) tensor), "sequence" (an (S,) tensor), "tensor" (a required input
        whose kind its shape tells: (N,), (S,) or ()) or "option" (has a default).

    Raises:
        TypeError: not callable, no statistic or no ``seq`` among the parameters, or *args.
    """
    return dict(_described(fn)[1])


def defaults(fn: Objective) -> dict[str, Any]:
    """The options of an objective with their default values."""
    return {
        p.name: p.default
        for p in inspect.signature(fn).parameters.values()
        if p.default is not p.empty and p.name not in (*STATISTICS, "seq")
    }


Description = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


def _described(fn: Objective) -> Description:
    if not callable(fn):
        raise TypeError(f"objective must be a callable (logps, ..., seq, ...), got {fn!r}")
    try:
        return _signature(fn)
    except TypeError as error:
        if "unhashable" in str(error):
            return _signature.__wrapped__(fn)
        raise


@functools.lru_cache(maxsize=256)
def _signature(fn: Objective) -> Description:
    parameters = inspect.signature(fn).parameters
    name = name_of(fn)
    named = tuple(s for s in STATISTICS if s in parameters)
    if not named or "seq" not in parameters:
        raise TypeError(
            f"objective {name} must take parameters named logps and seq (for logps also another "
            f"row statistic: {', '.join(STATISTICS[1:])}), got ({', '.join(parameters)})"
        )
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    try:
        hints = typing.get_type_hints(inner, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    found: list[tuple[str, str]] = []
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"objective {name} must name its inputs: no *args or **kwargs")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"objective {name} must take {parameter.name} by name: drop the /")
        if parameter.name in (*STATISTICS, "seq"):
            continue
        kinds = getattr(hints.get(parameter.name), "__metadata__", ())
        if kinds and kinds[0] in ("token", "sequence"):
            found.append((parameter.name, kinds[0]))
        elif parameter.default is parameter.empty:
            found.append((parameter.name, "tensor"))
        else:
            found.append((parameter.name, "option"))
    return named, tuple(found)


def name_of(fn: Objective) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", None) or repr(fn)
