"""A text as the row of tokens that a model reads in one piece: the prefix token once, then the text's own tokens.

Some tokenizers put BOS (and EOS) around every text themselves, others do not. Where a protocol is ours, neither that
habit nor `add_bos_token` changes a row: the text is encoded alone, and the prefix stands before it once, even where
the text spells it out. A second BOS would be scored as a token of the text, which costs a third of a sentence's nats
on some models, and would take a sink's place in a cache.
"""

from __future__ import annotations

from typing import Any

from kv_lm_eval.errors import UserError


def prefix_of(tokenizer: Any) -> int:
    """The token that a text begins after: BOS, or EOS where a tokenizer has no BOS, as lm-eval takes it.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has neither a BOS nor an EOS token to begin a text "
        "with; set prefix_token_id in --model_args"
    )


def text_tokens(tokenizer: Any, text: str, prefix: int | None = None) -> tuple[list[int], int]:
    """The tokens of a text that follow its prefix, and how many of its characters spell the prefix out (mostly 0).

    Args:
        prefix: the prefix token, None for `prefix_of` the tokenizer.
    """
    prefix = prefix_of(tokenizer) if prefix is None else prefix
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if tokens[:1] != [prefix]:
        return tokens, 0
    spelled = tokenizer.decode([prefix])
    return tokens[1:], len(spelled) if text.startswith(spelled) else 0


def document_row(tokenizer: Any, text: str, prefix: int | None = None) -> list[int]:
    """[prefix, the text's tokens]: what a protocol of ours feeds of a text."""
    prefix = prefix_of(tokenizer) if prefix is None else prefix
    return [prefix, *text_tokens(tokenizer, text, prefix)[0]]
