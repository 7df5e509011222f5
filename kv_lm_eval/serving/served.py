"""A model that its user has loaded, under one compression: what is checked once, and one generate() of it.

The model is lent (engine/lent.py): our attention function is under it during a call and gone after it, whatever happens
in between. Two calls at once on one model object would take it from under each other, so the second is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from kv_lm_eval import config
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine import adapter
from kv_lm_eval.engine.forward import below_adapter, cache_among, device_of, generate_with, kv_bytes_per_token
from kv_lm_eval.engine.generate import by_rows, check_generation_settings, decode, noting_first_token
from kv_lm_eval.engine.lent import our_attention, see_last, starting_anew
from kv_lm_eval.engine.prefill import feed_beginning
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.metrics.latency import Stopwatch
from kv_lm_eval.metrics.memory import PeakMemory
from kv_lm_eval.metrics.report import Report, of_snapshots, together
from kv_lm_eval.requests.served import served
from kv_lm_eval.settings import EngineSettings

Call = dict[str, Any]  # arguments of a generate(), by name
USED = ("prefill_chunk", "prefill_evict")  # of the engine's settings; the others are of evaluations
WITHOUT_LAYERS = {"input_ids", "inputs", "attention_mask"}  # what is no setting and yet nothing for the layers alone

_busy: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
_busy_lock = threading.Lock()


@contextmanager
def in_use(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Inside, the model is ours alone.

    Raises:
        UserError: it is in use already, by this thread or another.
    """
    with _busy_lock:
        if (other := _busy.get(model)) is not None:
            raise UserError(
                f"{what}: this model object is in use by {other}, and its attention can serve one cache at a time; "
                "leave that first, or load the model a second time"
            )
        _busy[model] = what
    try:
        yield
    finally:
        with _busy_lock:
            _busy.pop(model, None)


def model_of(model: Any, what: str) -> PreTrainedModel:
    """The transformers model itself, below an adapter.

    Raises:
        UserError: it is no decoder that transformers has loaded.
    """
    below = below_adapter(model)
    if not isinstance(below, PreTrainedModel):
        raise UserError(
            f"{what} takes a loaded transformers model, got {type(model).__name__}: load it first, "
            "AutoModelForCausalLM.from_pretrained(NAME)"
        )
    if below.config.is_encoder_decoder or not isinstance(below, GenerationMixin):
        raise UserError(
            f"{what}: {type(below).__name__} is no causal language model; only these have the KV cache that is "
            "compressed here. Load it with AutoModelForCausalLM"
        )
    return below


class Served:
    """A model under one compression.

    Args:
        called: the model, or an adapter around it. what: who asks, for messages.
        settings: method, budget and all else, as in --model_args. question: whether contexts come before questions.
        tokenizer: for methods that ask the model to repeat the prompt.

    Attributes:
        model: the transformers model itself. facts: what the self-check found, None for methods without a cache.
        calls: the report of each answered call.

    Raises:
        UserError: an unknown setting, or a model that cannot be served exactly, with the reason.
    """

    def __init__(
        self, called: Any, what: str, settings: dict[str, Any], question: bool = False, tokenizer: Any = None
    ) -> None:
        self.called, self.what, self.model = called, what, model_of(called, what)
        self.compression, self._engine = _parse(settings, what)
        method = self.compression.method
        adapter.check(called, self.model, method.uses_cache or method.recomputed_tokens is not None, method.name)
        engine = dataclasses.replace(self._engine, question_in_prompt=not question)
        self.facts, self._new_cache, _ = served(self.model, tokenizer, self.compression, engine)
        self._memory = PeakMemory({p.device for p in self.model.parameters()})
        self.calls: list[Report] = []

    def check_words(self, tokenizer: Any) -> None:
        """Raises UserError where the method speaks to the model and no tokenizer is there."""
        name, call = self.compression.method.name, self.what.removesuffix("()")
        if self.compression.method.reads_again and tokenizer is None:
            raise UserError(
                f"{self.what}: method={name} asks the model to repeat the prompt, for which it needs a tokenizer: "
                f"{call}(model, ..., tokenizer=tokenizer, method={name!r})"
            )

    def new_cache(self, kind: type[CompressedCache] = CompressedCache) -> CompressedCache:
        assert self._new_cache is not None
        return self._new_cache(of=kind)  # type: ignore[call-arg]

    def report(self) -> Report:
        """What all calls so far held and took."""
        return together(self.compression.method.name, self.calls)

    def report_of(self, cache: CompressedCache) -> Report:
        """What a cache holds now."""
        if not cache.batch:
            return Report(self.compression.method.name)
        rate = kv_bytes_per_token(self.model)
        return of_snapshots(self.compression.method.name, rate, cache.prefill_end, cache.snapshot())

    # ------------------------------------------------------------------------------------ one call

    def answer(
        self, generate: Callable[..., Any], call: Call, cache: Callable[[], CompressedCache] | None = None
    ) -> Any:
        """What `generate` says to a call, over a new cache or over one that holds the beginnings of the prompts.

        Args:
            cache: makes the cache, after the clock has started.

        Raises:
            UserError: the call asks for what a compressed cache cannot serve.
        """
        refuse(call, self.model, self.what)
        watch = Stopwatch(self._memory, device_of(self.model))
        with ExitStack() as put_on:
            if self.facts is None:
                if (length := self.compression.method.recomputed_tokens) is not None:
                    put_on.enter_context(see_last(self.model, length))
                put_on.enter_context(noting_first_token(self.model, watch.first_token))
                out = generate(**{**call, "use_cache": False})
                watch.end()
                self._note_uncached(call, out, watch)
                return out
            put_on.enter_context(our_attention(self.model))
            held = (cache or partial(self._begun, call))()
            for segment in held.segments:
                segment.around_cut = watch.around_cut
            held.around_cut = watch.around_cut
            put_on.enter_context(starting_anew(self.model, held))
            put_on.enter_context(noting_first_token(self.model, watch.first_token))
            beams = int(_asked(call, self.model, "num_beams") or 1)
            loop = by_rows(held, beams, compiled=_for_the_stock_loop(call, self.model))
            if (
                loop and call.get("streamer") is not None
            ):  # which generate() does not hand on to a loop that it is given
                loop = {"custom_generate": partial(decode, streamer=call["streamer"])}
            out = generate(**call, **generate_with(held), **loop)
        watch.end()
        self._note(self.report_of(held), watch)
        return out

    def _begun(self, call: Call) -> CompressedCache:
        """A new cache; where prompts go in chunks, with all but the last of them."""
        cache = self.new_cache()
        if self.facts is not None and self.facts.border is not None and self.facts.rope is not None:
            self.facts.rope.forget(device_of(self.model))
        if cache.prefill_chunk is None:
            return cache
        ids, mask = _ids_of(call), call.get("attention_mask")
        if mask is None and len(ids) > 1:
            raise UserError(
                f"prefill_chunk={cache.prefill_chunk} with {len(ids)} prompts and no attention_mask, which says what "
                "is padding: hand on all that the tokenizer returns, model.generate(**inputs)"
            )
        real = torch.ones_like(ids) if mask is None else mask
        pairs = zip(ids.tolist(), real.tolist(), strict=True)
        feed_beginning(self.model, cache, [[t for t, on in zip(*pair, strict=True) if on] for pair in pairs])
        copies = max(int(_asked(call, self.model, name) or 1) for name in ("num_beams", "num_return_sequences"))
        if copies > 1 and cache.batch:
            cache.batch_repeat_interleave(copies)
        return cache

    def _note(self, one: Report, watch: Stopwatch) -> None:
        new = one.new_tokens // max(one.answers, 1) + 1
        timing = watch.timings(max(one.answers, 1), False, [new] * max(one.answers, 1), new)[0]
        new_tokens = one.new_tokens + one.answers  # the last token of an answer is never fed
        times = {name: getattr(timing, name) for name in ("ttft_s", "total_s", "compression_s")}
        self.calls.append(dataclasses.replace(one, new_tokens=new_tokens, **times))

    def _note_uncached(self, call: Call, out: Any, watch: Stopwatch) -> None:
        ids, sequences = _ids_of(call), getattr(out, "sequences", out)
        rows, new = len(sequences), sequences.shape[1] - ids.shape[1]
        full = rows * (sequences.shape[1] - 1) * kv_bytes_per_token(self.model)
        name, tokens = self.compression.method.name, rows * ids.shape[1]
        self._note(Report(name, rows, 0, tokens, rows * (new - 1), 0.0, 0.0, full), watch)


def _parse(settings: dict[str, Any], what: str) -> tuple[Compression, EngineSettings]:
    compression, engine, rest = config.parse(settings, pass_through=set())
    unused = [f.name for f in dataclasses.fields(engine) if f.name not in USED and getattr(engine, f.name) != f.default]
    if unused or rest:
        name = (unused or list(rest))[0]
        raise UserError(
            f"{what}: {name} is a setting of evaluations or of loading a model and has no effect here; leave it out "
            f"(the engine's settings that have one are {' and '.join(USED)})"
        )
    return compression, engine


# ---------------------------------------------------------------------------------------------------- what is asked


def named(args: tuple[Any, ...], kwargs: Call) -> Call:
    """The arguments of a generate() by their names."""
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def refuse(call: Call, model: PreTrainedModel, what: str) -> None:
    """Raises UserError for what a compressed cache cannot serve."""
    names = ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")
    check_generation_settings(
        {**{name: _asked(call, model, name) for name in names}, "assistant_model": call.get("assistant_model")}
    )
    if cache_among(call) is not None or call.get("past_key_values") is not None:
        raise UserError(f"{what} makes the cache itself: leave past_key_values out, or use compressed_cache() alone")
    if call.get("use_cache") is False:
        raise UserError(f"use_cache=False leaves {what} nothing to compress: leave it out, or use method=no_cache")
    if call.get("custom_generate") is not None:
        raise UserError(f"custom_generate brings a loop of its own and {what} has one: leave one of them out")
    if call.get("inputs_embeds") is not None:
        raise UserError(f"{what} reads token ids, which methods and rows are told apart by; give input_ids")
    if call.get("position_ids") is not None:
        raise UserError(f"{what} counts positions itself, from attention_mask; leave position_ids out")
    if _asked(call, model, "output_attentions"):
        raise UserError(
            f"output_attentions=True: under {what} no layer has one matrix of attention, since every head may hold "
            "other tokens; leave it out"
        )


def _asked(call: Call, model: PreTrainedModel, name: str) -> Any:
    """A setting of generate(): the call's own, its generation_config's, the model's."""
    given = call.get("generation_config")
    for source in (call, given, model.generation_config):
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if value is not None:
            return value
    return None


def _for_the_stock_loop(call: Call, model: PreTrainedModel) -> bool:
    """Whether the call has or asks for something that only the stock loop is handed, or hands on: of the layers, and
    the tokenizer that finds stop strings."""
    settings = {*inspect.signature(GenerationMixin.generate).parameters, *vars(GenerationConfig())} | WITHOUT_LAYERS
    return bool(_asked(call, model, "output_hidden_states")) or any(
        value is not None for name, value in call.items() if name not in settings
    )


def _ids_of(call: Call) -> torch.Tensor:
    ids: torch.Tensor | None = call.get("input_ids", call.get("inputs"))
    if ids is None:
        raise UserError("generate() needs input_ids: model.generate(**tokenizer(text, return_tensors='pt'))")
    return ids
