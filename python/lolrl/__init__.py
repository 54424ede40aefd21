"""The A-LoL recipe around lolkernels: data, reference scores, value head, trainer, evaluation.

Names are imported on first use, so that reading a configuration does not load a model library.
The two stages that share their module's name are `lolrl.annotate.annotate` and
`lolrl.evaluate.evaluate`.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "config": (
        "AnnotateConfig",
        "ConfigError",
        "LoLConfig",
        "ValueConfig",
        "dump_config",
        "load_config",
    ),
    "data": ("DataError", "Record", "RecordList", "read_prompts", "read_records"),
    "files": ("write_jsonl",),
    "tokens": ("LoLDataset", "completion_text", "encode", "encode_prompt", "prompt_text"),
    "collate": ("LoLCollator", "PackingCollator"),
    "sampler": ("UpdateSampler",),
    "value": ("ValueHead", "ValueReport", "fit_value_head", "predict_values"),
    "cache": ("StaleCacheError",),
    "checkpoints": ("CheckpointError",),
    "annotate": ("Annotated", "call_reward_funcs", "score_logps"),
    "trainer": ("LoLTrainer", "StepZeroError", "sft", "train"),
    "evaluate": ("EvalReport", "generate"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lolrl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lolrl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
