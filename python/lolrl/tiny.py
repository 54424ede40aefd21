"""A tokenizer and a small Llama made from scratch: what the demo and the tests train offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def build_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> Any:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, trained on `texts`.

    It has `<pad>`, `<bos>` and `<eos>`, no unknown token (every byte is an entry), and decodes to
    exactly the text that was encoded. Raises ValueError on a vocab_size below 259.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size must be >= {256 + len(special)} (all bytes): got {vocab_size}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: Any,
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    positions: int = 256,
    seed: int = 0,
) -> Any:
    """A Llama for `tokenizer` with tied embeddings, random weights drawn with `seed`, fp32.

    With the defaults and 2,048 entries: 1.07 million parameters.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
