"""Made on the spot, offline: toy tokenizers of four kinds, tiny models, rows with rewards."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from lolrl.config import LoLConfig
from lolrl.data import read_records
from lolrl.tokens import LoLDataset
from lolrl.trainer import LoLTrainer

CORPUS = [
    "the movie was good and long",
    "a dull story with a bright end",
    "nobody laughed , everybody cried",
    "it moves slowly but it moves me",
]
CHAT = (
    "{{ bos_token or '' }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    *,
    bos: bool = True,
    pad: str = "<pad>",
    extra: tuple[str, ...] = (),
    template: str | None = None,
    suffix_eos: bool = False,
) -> Any:
    """Byte-level BPE with these specials; `bos` and `suffix_eos`: what it adds by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    pieces = (["<bos>"] if bos else []) + ["$A"] + (["<eos>"] if suffix_eos else [])
    if len(pieces) > 1:
        core.post_processor = processors.TemplateProcessing(
            single=" ".join(pieces), special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        pad_token=pad,
        additional_special_tokens=[AddedToken(t, special=True) for t in extra],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "pad_is_eos": {"pad": "<eos>", "suffix_eos": True},
    "multi_eos": {"extra": ("<eot>", "<eom>")},
    "no_bos": {"bos": False},
    "template_bos": {"extra": ("<|user|>", "<|assistant|>"), "template": CHAT},
}


def make_llama(
    vocab: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    **kw: Any,
) -> Any:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **kw,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            # Peaky enough that log-probs differ between tokens and rows.
            for parameter in model.parameters():
                parameter.mul_(4) if parameter.dim() > 1 else None
    return model.to(dtype)


def make_gpt2(vocab: int, *, seed: int = 0, dropout: float = 0.0) -> Any:
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(20)
    return model


ENDS = [
    "good",
    "bright and good end",
    "dull",
    "a long story , nobody laughed but it moves me",
    "cried",
]


def make_rows(count: int) -> list[dict[str, Any]]:
    """Completions of uneven lengths; rewards and values give advantages of both signs."""
    return [
        {
            "prompt": CORPUS[i % len(CORPUS)][: 8 + i % 7] + " ",
            "completion": f"{ENDS[i % len(ENDS)]} {i}",
            "reward": (i * 37 % 11) / 5 - 0.6,
            "value": 0.2 - (i % 3) / 10,
        }
        for i in range(count)
    ]


def make_dataset(tokenizer: Any, count: int, **kw: Any) -> LoLDataset:
    return LoLDataset.from_records(read_records(make_rows(count)), tokenizer, **kw)


def make_config(folder: Path | str, **kw: Any) -> LoLConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_best_and_last": False,
        "max_steps": 2,
        "seed": 0,
    }
    return LoLConfig(**{**settings, **kw})


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def reload(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


class Gradients(TrainerCallback):
    """Keeps the gradient of every update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kw) -> None:
        trained = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        self.seen.append({n: grad.clone() for n, grad in trained})


def build(
    folder: Path, data: Any, tok: Any, *, model=None, dtype=torch.float64, seed=0, given=None, **kw
) -> LoLTrainer:
    """A trainer of `model`, or of a toy Llama; `given`: further arguments, `kw`: the settings."""
    model = make_llama(len(tok), dtype=dtype, seed=seed) if model is None else model
    usual = {"args": make_config(folder, **kw), "train_dataset": data, "processing_class": tok}
    return LoLTrainer(model, **usual | (given or {}))


def run(folder: Path, data: Any, tok: Any, *, resume=None, **kw: Any) -> Any:
    """Train what `build` makes and keep the gradient of every update."""
    gradients = Gradients()
    trainer = build(folder, data, tok, **kw)
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=resume)
    trainer.gradients = gradients.seen
    return trainer


def row_logps(model: Any, item: dict[str, Any]) -> torch.Tensor:
    """Log-probs (T,) of one row's completion tokens, by log-softmax of the model's own logits."""
    ids = item["input_ids"]
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return logps[:-1].gather(1, ids[1:, None])[item["prompt_length"] - 1 :, 0]


def same_parameters(a: Any, b: Any, atol: float = 0.0) -> None:
    mine, theirs = parameters(a), parameters(b)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=atol, msg=name)
