"""Generation is transformers' own generate() over a compressed cache: sampling and stops are as users know them.

generate() prepares settings, logits processors and stopping criteria and hands them to a loop. `decode` is that loop
for a compressed cache: the prompts are one packed forward, cut after it, and every further forward is a decode step of
the rows that have not ended, under the method's schedule. A row that has ended leaves the batch. The first new token
comes from the whole prompt, as in all published methods. With question_in_prompt=False (`question.py`) the cache comes
with all but the last prompt token in it, and that token is the loop's first forward.

The stock loop, `model.generate(input_ids, attention_mask=..., past_key_values=CompressedCache(...))`, gives the same
answers with the padding computed and every row decoded until the last has ended; beams and compiled steps take it.

Shapes: B rows, N columns of the left-padded prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.forward import cache_among
from kv_lm_eval.engine.prefill import Logits, feed
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import compression_of


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


def by_rows(
    cache: CompressedCache, beams: int = 1, compiled: bool = False, first: Logits | None = None
) -> dict[str, Any]:
    """The argument with which generate() takes `decode` for its loop, where it can; none where the stock loop is to go
    over the cache: for beams, compiled steps and models that start anew beyond some length.

    Args:
        first: each row's last logits [1, V] where the prompts have been fed to their end.
    """
    stock, method = beams > 1 or compiled or cache.facts.border is not None, compression_of(cache).method
    if stock and method.reads_again:
        what = "num_beams" if beams > 1 else "compile=True" if compiled else "a model that rotates by the length"
        raise UserError(
            f"method={method.name} reads the prompt a second time before its cut, which generate()'s own loop does not "
            f"do, and {what} needs that loop; leave it out, or take a method that reads once, such as snapkv"
        )
    cache.keep_history(stock and beams == 1)
    assert first is None or not stock
    return {} if stock else {"custom_generate": partial(decode, first=first)}


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    first: Logits | None = None,
    **words: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """generate()'s loop: one token after another for each row, until all have ended.

    Args:
        input_ids: [B, N] prompts, left-padded. words: what generate() has for the model, with the mask and the cache,
            which may hold the beginnings of the prompts. first: the last logits of prompts that it holds whole.

    Returns:
        [B, N + new] token ids, padded after the end of each row; with scores and logits where these are asked for.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(
            f"the generation settings ask for {mode.value}, which a compressed cache does not serve; greedy search, "
            "sampling and beams are there"
        )
    cache, mask = cache_among(words), words.get("attention_mask")
    assert isinstance(cache, CompressedCache)
    real = torch.ones_like(input_ids) if mask is None else mask
    pairs = zip(input_ids.tolist(), real.tolist(), strict=True)
    prompts = [[token for token, there in zip(*pair, strict=True) if there] for pair in pairs]
    seen = cache.seen if cache.batch else [0] * len(prompts)
    new: list[list[int]] = [row[n:] for row, n in zip(prompts, seen, strict=True)]
    logits, alive = input_ids.new_zeros(0), torch.ones(len(new), dtype=torch.bool, device=input_ids.device)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    scores, raw = list[torch.Tensor](), list[torch.Tensor]()
    while True:
        fed, first = (feed(model, cache, new, keep=1) if first is None else first), None
        if not len(logits):
            cache.gather()
            logits = torch.zeros(len(new), fed[0].shape[1], device=input_ids.device)
        rows = list(fed)
        logits[rows] = torch.cat([fed[row] for row in rows]).to(logits)
        chosen_by = logits_processor(input_ids, logits.clone())  # type: ignore[arg-type]
        if generation_config.return_dict_in_generate:
            scores.append(chosen_by)
            raw.append(logits.clone())
        if generation_config.do_sample:
            tokens = torch.multinomial(chosen_by.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = chosen_by.argmax(-1)
        if ends:
            tokens = torch.where(alive, tokens, generation_config._pad_token_tensor)  # type: ignore[arg-type]
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        alive = alive & ~stopping_criteria(input_ids, tuple(scores))
        going = alive.tolist()
        if not any(going):
            break
        cache.close([row for row, on in enumerate(going) if not on])
        new = [[token] if on else [] for token, on in zip(tokens.tolist(), going, strict=True)]
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    asked = (generation_config.output_scores and tuple(scores), generation_config.output_logits and tuple(raw))
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=asked[0] or None, logits=asked[1] or None)  # type: ignore[arg-type]


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
