"""Generation is transformers' own generate() over a compressed cache: sampling, beams and stops are as users know them.

`model.generate(input_ids, attention_mask=..., past_key_values=CompressedCache(...))`: the prompt is one forward, cut
after it, and every further forward is a decode step under the method's schedule. The first new token comes from the
whole prompt, as in all published methods. With question_in_prompt=False (`question.py`) the cache comes with all but
the last prompt token in it, and that token is generate()'s first forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from kv_lm_eval.errors import UserError


def check_generation_settings(settings: dict[str, Any]) -> None:
    """Raises UserError for settings of generate() that cannot work with a cache under test."""
    if settings.get("cache_implementation") is not None:
        raise UserError(
            f"cache_implementation={settings['cache_implementation']} in the generation settings: the cache is the "
            "method under test here, so another one cannot be used; remove the setting"
        )
    if settings.get("prefill_chunk_size") is not None:
        raise UserError(
            "prefill_chunk_size in the generation settings: the cut follows the prompt's one forward, so only the "
            "first chunk would be compressed, and as if it were the whole prompt; remove the setting"
        )
    if settings.get("assistant_model") is not None or settings.get("prompt_lookup_num_tokens"):
        raise UserError("assisted decoding takes tokens back, which a compressed cache cannot; remove the setting")


@contextmanager
def noting_first_token(model: PreTrainedModel, note: Callable[[], None]) -> Iterator[None]:
    """Calls `note` when the first new token of a generate() inside is on the host: as its second forward begins.

    Nothing is called for the other tokens, so that decoding is timed undisturbed. A generate() of one token has no
    second forward and calls nothing.
    """
    forwards = 0

    def before_forward(*args: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 2:
            note()

    hook = model.register_forward_pre_hook(before_forward)
    try:
        yield
    finally:
        hook.remove()
