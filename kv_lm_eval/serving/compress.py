"""One line around a script's own generate(): `compress`; and a cache for loops of one's own: `compressed_cache`.

with compress(model, method="snapkv", max_capacity_prompt=512) as compressed:
    model.generate(**inputs)
print(compressed.report())
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.lent import our_attention, replaced, starting_anew
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.report import Report
from kv_lm_eval.serving.served import Served, in_use, model_of, named


class Compressing:
    """A block of `compress`: it answers what the model's generate() is asked."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._generate = served.called.generate
        self._one = threading.Lock()

    def report(self) -> Report:
        """What the answers so far held and took; as text it is one line."""
        return self._served.report()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate(), over a compressed cache; any thread may call it, one at a time."""
        if not self._one.acquire(blocking=False):
            raise UserError(
                "a second generate() on a model inside compress() while the first one runs: put the prompts into one "
                "batch, or wait for it"
            )
        try:
            return self._served.answer(self._generate, named(args, kwargs))
        finally:
            self._one.release()

    def wait(self) -> None:
        """Until no thread is in generate() any more."""
        with self._one:
            pass

    def check_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        """Refuses a forward outside of generate(), which would run over the full cache without a word."""
        if not self._one.locked():
            raise UserError(
                "a forward of one's own inside compress() has no compressed cache: call model.generate(), or use "
                "`with compressed_cache(model, ...) as cache` and hand it the cache as past_key_values"
            )


@contextmanager
def compress(model: Any, method: str | None = None, *, tokenizer: Any = None, **settings: Any) -> Iterator[Compressing]:
    """Inside, `model.generate(...)` runs over a compressed cache, a new one for each call; afterwards it is as it was.

    Batches with left padding, streamers, sampling, beams and several returned sequences are transformers' own. A row of
    a batch is answered as it would be alone. Forwards of one's own, assisted decoding and other caches are refused.

    Args:
        model: as `from_pretrained` returns it, or an adapter of PEFT around it.
        method: as `kv-lm-eval methods` lists them; may come with a preset instead.
        tokenizer: the model's, for methods that ask it to repeat the prompt (kvzip).
        **settings: its budget and settings, as in --model_args.

    Raises:
        UserError: an unknown setting, or a model that cannot be served exactly; it is checked on entering, by some
            twenty short forwards, so put one block around many calls.
    """
    with in_use(model_of(model, "compress()"), "compress()"):
        served = Served(model, "compress()", {"method": method, **settings}, tokenizer=tokenizer)
        served.check_words(tokenizer)
        block = Compressing(served)
        hook = model_of(model, "compress()").register_forward_pre_hook(block.check_forward, with_kwargs=True)
        try:
            with replaced(model, "generate", block.generate):
                try:
                    yield block
                finally:
                    block.wait()
        finally:
            hook.remove()


class ReportingCache(CompressedCache):
    """A compressed cache that says what it holds."""

    served: Served

    def report(self) -> Report:
        """What it holds now, without times; as text it is one line."""
        return self.served.report_of(self)


@contextmanager
def compressed_cache(model: Any, method: str | None = None, **settings: Any) -> Iterator[ReportingCache]:
    """A compressed cache for one batch, to hand over as past_key_values, to generate() or to forwards of one's own.

    It is a block and no plain object, since a model reads such a cache only through our attention function, which is
    under the model inside; a forward without the cache is refused there. A prompt is cut after its one forward, what
    follows are decode steps under the method's schedule.

    Args and Raises: as of `compress`.
    """
    what = "compressed_cache()"
    with in_use(model_of(model, what), what):
        served = Served(model, what, {"method": method, **settings})
        if served.facts is None:
            raise UserError(f"{what}: method={served.compression.method.name} has no cache; use compress() for it")
        if served.compression.method.reads_again:
            name = served.compression.method.name
            raise UserError(f"{what}: method={name} reads a prompt twice, which compress() and prefill() do for it")
        cache = served.new_cache(ReportingCache)
        assert isinstance(cache, ReportingCache)
        if cache.prefill_chunk is not None:
            raise UserError(f"{what}: chunks of a prompt are fed by compress(); leave prefill_chunk out")
        cache.served = served
        cache.keep_history(True)
        if served.facts.border is not None and served.facts.rope is not None:
            served.facts.rope.forget(served.model.device)
        with our_attention(served.model), starting_anew(served.model, cache):
            yield cache
