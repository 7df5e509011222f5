"""One call of lm-eval's, generate_until, loglikelihood or loglikelihood_rolling: what its parts share.

What is known of a request, its document, its question, its numbers, is found by the request, never by its words: two
tasks may ask the same in one run and mean different things.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.engine import forward
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.lent import in_format, our_attention, see_last, without_cache
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.metrics.compression import CompressionLog, RequestId, RequestRecord, digest, records_of, uncut
from kv_lm_eval.metrics.latency import Stopwatch, Timing
from kv_lm_eval.metrics.memory import PeakMemory
from kv_lm_eval.requests.answers_of_full import AnswersOfFull
from kv_lm_eval.requests.boundaries import Boundary, tokens_by_offsets, tokens_by_prefix
from kv_lm_eval.requests.halving import Halving
from kv_lm_eval.requests.own_keys import OwnKeys
from kv_lm_eval.settings import EngineSettings

log = logging.getLogger("lm_eval.models.kvcompressed")  # below lm-eval's logger: its format, its verbosity


@dataclass(frozen=True)
class Run:
    """One call's requests, and what it takes to run and to record them.

    Attributes:
        kind, requests: of lm-eval; there may be fewer requests than rows where it hands over tokens only.
        lm: lm-eval's own part of our model: tokenizer, lengths, batch size, answers kept on the way.
        name: of the model, in records.
        new_cache, facts, decoder: None for methods without a cache, and without compile=True.
        last_logits: one plain forward of rows [B, q]: the last logits [B, count, V].
        log, halving, memory, warmed_up: of the LM object; they outlive the call.
        own_keys: answers of --use_cache that lm-eval cannot look up.
        answers_of_full: the full cache's answers, with fidelity=True.
    """

    kind: str
    requests: Sequence[Instance]
    lm: HFLM
    name: str
    compression: Compression
    engine: EngineSettings
    new_cache: Callable[[], CompressedCache] | None
    facts: ModelFacts | None
    decoder: Decoder | None
    last_logits: Callable[[torch.Tensor, int], torch.Tensor]
    log: CompressionLog
    halving: Halving
    memory: PeakMemory
    warmed_up: set[str]
    own_keys: OwnKeys | None = None
    answers_of_full: AnswersOfFull | None = None

    # ------------------------------------------------------------------------------------ running

    @property
    def causal_lm(self) -> transformers.PreTrainedModel:
        """The transformers model itself, below an adapter."""
        return forward.below_adapter(self.lm.model)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides an answer beside the model: method, settings after defaults, engine settings."""
        return {**self.compression.settings(), **vars(self.engine)}

    @contextmanager
    def model_in_use(self) -> Iterator[None]:
        """Around each call: what the method needs on the model object, which others may use between two calls."""
        method = self.compression.method
        objects = {id(m): m for m in (self.causal_lm, self.lm.model)}  # the second is the adapter, where there is one
        with ExitStack() as put_on:
            put_on.enter_context(in_format(objects.values(), self.lm.mixed_precision_dtype, self.lm.device.type))
            if method.uses_cache:
                put_on.enter_context(our_attention(self.causal_lm))
            elif self.kind == "generate_until":
                put_on.enter_context(without_cache(self.lm.model))
                if (length := method.recomputed_tokens) is not None:
                    put_on.enter_context(see_last(self.causal_lm, length))
            yield

    @property
    def gains_by_batches(self) -> bool:
        """A CPU computes rows one after the other anyway."""
        return self.lm.device.type != "cpu"

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch; None: as many as fit."""
        return None if self.lm.batch_size == "auto" else int(self.lm.batch_size)

    @property
    def question_first(self) -> bool:
        """Whether contexts are compressed before their questions are seen."""
        return not self.engine.question_in_prompt and self.compression.lossy

    def alone(self, tokens: int) -> bool:
        """Whether a row of so many tokens shares no batch, since their number turns all of its tokens."""
        return self.facts is not None and self.facts.beyond(tokens)

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.memory, self.lm.device)

    def timed_cache(self, watch: Stopwatch) -> CompressedCache:
        assert self.new_cache is not None
        cache = self.new_cache()
        cache.around_cut = watch.around_cut
        return cache

    def caches(self, watch: Stopwatch) -> Callable[[], CompressedCache]:
        """New caches whose cuts the watch measures."""
        return partial(self.timed_cache, watch)

    def hidden(self, disable_tqdm: bool) -> bool:
        """Whether progress bars are."""
        return disable_tqdm or self.lm.rank != 0

    # ------------------------------------------------------------------------------------ requests

    def tokens_from(self, text: str, start: int) -> int:
        """Tokens of a text from its character `start` on."""
        lm = self.lm
        if not lm.tokenizer.is_fast:
            return tokens_by_prefix(lm.tok_encode, text, start)
        special = lm.add_bos_token is not False
        encoded = lm.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return tokens_by_offsets(encoded["offset_mapping"], start)

    def encode(self, text: str) -> list[int]:
        """The tokens of a part of a prompt, no special ones put before it."""
        return [int(token) for token in self.lm.tok_encode(text, add_special_tokens=False)]

    def doc(self, i: int) -> dict[str, Any]:
        """A request's document."""
        doc = self.requests[i].doc if i < len(self.requests) else None
        return doc if isinstance(doc, dict) else {}

    def called(self, i: int) -> str:
        """A request in an error message."""
        if i >= len(self.requests):
            return f"request {i}"
        request = self.requests[i]
        where = f"document {request.doc_id}" if request.doc_id is not None else f"request {i}"
        return f"{where} of {request.task_name or 'this task'}"

    def who(self, i: int) -> RequestId:
        """A request in the log."""
        if i >= len(self.requests):
            return RequestId("", self.kind, prompt=f"#{i}")
        request = self.requests[i]
        prompt = digest((request.args[0], request.doc))
        return RequestId(request.task_name or "", self.kind, request.doc_id, request.idx, prompt)

    def by_task(self, members: Sequence[int]) -> dict[int, int]:
        """Requests that share a prefill, each with the first one of its task, in whose name it is logged."""
        first: dict[str, int] = {}
        return {i: first.setdefault(self.who(i).task, i) for i in members}

    def check_prompts(self, lengths: Sequence[int], room: Sequence[int]) -> None:
        """Refuses empty and over-long prompts before any work is done.

        Args:
            lengths: tokens of each prompt. room: tokens that it may have.
        """
        if empty := [i for i, n in enumerate(lengths) if not n]:
            raise UserError(
                f"{len(empty)} of {len(lengths)} prompts are empty (0 tokens), the first that of "
                f"{self.called(empty[0])}: there is nothing to condition on"
            )
        over = [n for n, most in zip(lengths, room, strict=True) if n > most]
        if over and self.engine.overlong == "error":
            raise UserError(
                f"{len(over)} of {len(lengths)} prompts are longer than the model's maximum of {self.lm.max_length} "
                f"tokens leaves room for (longest {max(over)}); they would lose their beginning. Set max_length=... if "
                "the model can take more, or overlong=truncate_left to cut them as lm-eval's hf model does."
            )

    # ------------------------------------------------------------------------------------ answers kept on the way

    def kept(self, i: int, boundary: Boundary | None) -> Any:
        """The answer of a request that --use_cache has and lm-eval could not find; None: it is to be run."""
        if self.own_keys is None or i >= len(self.requests):
            return None
        return self.own_keys.get(self.kind, self.requests[i].args, boundary and boundary.tail_tokens)

    def keep(self, i: int, answer: Any, boundary: Boundary | None) -> None:
        """Hands an answer to --use_cache as soon as it is there."""
        if i >= len(self.requests):
            return
        args = self.requests[i].args
        if self.own_keys is not None:
            self.own_keys.put(self.kind, args, boundary and boundary.tail_tokens, answer)
        self.lm.cache_hook.add_partial(self.kind, args, answer)

    # ------------------------------------------------------------------------------------ records

    def first_of_its_kind(self) -> bool:
        """Whether this is the first batch of its kind, which warms the device up."""
        first = self.kind not in self.warmed_up
        self.warmed_up.add(self.kind)
        return first

    def record(
        self,
        members: Sequence[int],
        prefill: dict[str, Any],
        end: dict[str, Any],
        rows: Sequence[int] | None = None,
        boundaries: Sequence[Boundary] | None = None,
    ) -> list[RequestRecord]:
        """Logs a batch, see `records_of`; boundaries are those of the rows."""
        if boundaries is not None:
            tokens, empty = [b.tail_tokens for b in boundaries], [b.empty for b in boundaries]
            end = {**end, "question_tokens": tokens, "question_empty": empty}
        made = records_of([self.who(i) for i in members], prefill, end, rows)
        self.log.add_batch(made)
        return made

    def record_uncached(
        self, members: Sequence[int], lengths: list[int], timings: list[Timing] | None = None
    ) -> list[RequestRecord]:
        """Requests that held no compressed cache: those of method=no_cache, and lm-eval's windows under full."""
        snapshot = uncut(
            lengths, self.lm.max_length, forward.kv_bytes_per_token(self.lm.model) if self.facts is not None else 0
        )
        return self.record(members, snapshot, {**snapshot, "timing": timings} if timings else snapshot)
