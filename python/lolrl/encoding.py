"""Ids of a prompt and its completion, and the boundary between them.

The ids of a row are always those of the *whole* text: `ids == tokenize(prompt + completion)`,
and the completion starts where the ids of the prompt alone stop agreeing with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lolrl.rows import Text


def prefix_ids(tokenizer: Any) -> list[int]:
    """The ids the tokenizer puts before every text (usually [BOS] or nothing)."""
    # Compared on a text, not on "": some post-processors add nothing to an empty one.
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return [int(i) for i in whole[:start]]
    raise ValueError(
        "processing_class: the tokens of 'a' with and without special tokens do not overlap; "
        "lolrl needs a tokenizer whose special tokens only surround the text"
    )


def text_ids(tokenizer: Any, text: str, *, prefix: list[int] | None = None) -> list[int]:
    """Ids of a text behind the tokenizer's own prefix; a text that begins with BOS keeps one."""
    prefix = prefix_ids(tokenizer) if prefix is None else prefix
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids


def _chat_ids(tokenizer: Any, messages: list[dict[str, Any]], generation_prompt: bool) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "processing_class has no chat template, so rows of messages cannot be tokenised; set "
            "tokenizer.chat_template or give prompt and completion as strings"
        )
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=True
    )["input_ids"]
    return [int(i) for i in ids]


def _keep_end(ids: list[int], limit: int | None, tokenizer: Any) -> list[int]:
    """The last `limit` ids; a leading BOS stays in front of them."""
    if limit is None or len(ids) <= limit:
        return ids
    bos = tokenizer.bos_token_id
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - limit + 1 :]]
    return ids[len(ids) - limit :]


def encode_prompt(
    tokenizer: Any, prompt: Text, *, max_prompt_length: int | None = None
) -> list[int]:
    """Ids of a prompt alone, as generation starts from it.

    A string gets the tokenizer's own prefix (one BOS at most) and nothing behind it; messages go
    through the chat template with its generation prompt. Of a longer prompt the end and
    BOS are kept.

    Raises:
        ValueError: messages without a chat template; a tokenizer with specials inside the text.
    """
    if isinstance(prompt, str):
        ids = text_ids(tokenizer, prompt)
    else:
        ids = _chat_ids(tokenizer, prompt, True)
    return _keep_end(ids, max_prompt_length, tokenizer)


def encode(
    tokenizer: Any,
    prompt: Text,
    completion: Text,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    eos_ids: Sequence[int] | None = None,
    prefix: list[int] | None = None,
) -> tuple[list[int], int]:
    """Ids of prompt and completion, and the number of them that belong to the prompt.

    The boundary is the longest common prefix of the ids of the prompt and of the whole. EOS is
    appended to a plain completion that does not end in it; a chat template writes its own. The
    prompt keeps its end (and BOS), the completion its start, without EOS if it was cut.

    Args:
        eos_ids: ids that end a text already, for models with several; default: the tokenizer's one.
        prefix: `prefix_ids(tokenizer)`, if known.

    Returns:
        (ids, prompt_length): the completion's tokens are `ids[prompt_length:]`.

    Raises:
        ValueError: as in `encode_prompt`.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        prefix = prefix_ids(tokenizer) if prefix is None else prefix
        before = text_ids(tokenizer, prompt, prefix=prefix)
        ids = text_ids(tokenizer, prompt + completion, prefix=prefix)
        eos = tokenizer.eos_token_id
        ends = {eos, *(eos_ids or ())}
        if eos is not None and (len(ids) <= len(prefix) or ids[-1] not in ends):
            ids.append(eos)
    elif isinstance(prompt, list) and isinstance(completion, list):
        before = _chat_ids(tokenizer, prompt, True)
        ids = _chat_ids(tokenizer, prompt + completion, False)
    else:
        raise TypeError("prompt and completion must both be strings or both be lists of messages")
    length = 0
    while length < min(len(before), len(ids)) and before[length] == ids[length]:
        length += 1
    head = _keep_end(ids[:length], max_prompt_length, tokenizer)
    tail = ids[length:]
    if max_completion_length is not None:
        tail = tail[:max_completion_length]
    return head + tail, len(head)


def prompt_text(prompt: Text) -> str:
    """A string as it is; the content of the last message of a list."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""


completion_text = prompt_text


def head_rows(model: Any) -> int:
    """Rows of the model's output head: ids must be below it."""
    head = model.get_output_embeddings()
    if head is None:
        return int(model.config.vocab_size)
    # Partitioned by ZeRO-3 a weight is empty, and its shape stands elsewhere.
    return int(getattr(head.weight, "ds_shape", head.weight.shape)[0])


def model_eos_ids(model: Any) -> list[int]:
    """Every id at which the model's generation stops."""
    generation = getattr(model, "generation_config", None)
    ids = generation.eos_token_id if generation is not None else model.config.eos_token_id
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, (list, tuple)) else [int(ids)]
