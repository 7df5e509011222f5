"""How requests are run, whatever the method: the engine's settings, and what they have no effect on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base
from kv_lm_eval.methods.compression import Compression


@dataclass(frozen=True)
class EngineSettings:
    """How requests are run, whatever the method."""

    tail_tokens: int = dataclasses.field(
        default=1,
        metadata={
            "help": "loglikelihood: context tokens fed after the compression, before the continuation; with 0 the "
            "first continuation token would be scored from the uncompressed prompt"
        },
    )
    rolling_compress_every: int = dataclasses.field(
        default=64,
        metadata={"help": "loglikelihood_rolling: cut the cache every this many tokens, where compress_every is 0"},
    )
    overlong: str = dataclasses.field(
        default="error",
        metadata={
            "help": "a prompt longer than the model's maximum: stop with an error before any work, or cut it from the "
            "left as lm-eval does",
            "choices": ("error", "truncate_left"),
        },
    )
    question_in_prompt: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "True: the whole prompt is compressed, its question included; False: what stands before the "
            "question is compressed first, and the question is fed over the compressed cache"
        },
    )
    question_field: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "question_in_prompt=False: the document's field with the question; None: the first of question, "
            "input, query, problem, goal that is found in the prompt"
        },
    )

    prefill_chunk: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "feed a prompt in chunks of this many tokens and cut after the last one: the same answers in less "
            "memory; None: in one forward"
        },
    )
    prefill_evict: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "the same with a cut after every chunk, so that the memory does not grow with the prompt: OTHER "
            "answers, since later chunks do not see what was evicted; for methods that work online (not for documents, "
            "which are streamed anyway)"
        },
    )

    compile: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "generate_until: decode by one compiled graph (a CUDA graph on CUDA), for method=streaming_ring "
            "and for compress_every=0; compiling takes a minute for each batch size and number of slots"
        },
    )

    fidelity: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "run the full cache beside the method over the same tokens and say how far apart their next-token "
            "distributions are (docs/fidelity.md); takes twice the time, and times are then not reported"
        },
    )

    def __post_init__(self) -> None:
        for name in ("prefill_chunk", "prefill_evict"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"{name}={size} must be at least 1 token; None feeds a prompt in one forward")
        if self.prefill_chunk is not None and self.prefill_evict is not None:
            raise UserError(
                f"prefill_chunk={self.prefill_chunk} and prefill_evict={self.prefill_evict} both cut the prompt up; "
                "give the first for the answers of one forward, the second for memory that does not grow"
            )
        if self.question_field is not None and self.question_in_prompt:
            raise UserError(
                f"question_field={self.question_field} has no effect with question_in_prompt=True, under which the "
                "whole prompt is compressed; add question_in_prompt=False"
            )
        if self.tail_tokens < 0:
            raise UserError(f"tail_tokens={self.tail_tokens} is negative; it counts context tokens, 0 or more")
        if self.rolling_compress_every < 1:
            raise UserError(f"rolling_compress_every={self.rolling_compress_every} must be at least 1 token")

    def warnings(self, compression: Compression) -> list[str]:
        """Settings that do nothing with this compression; they are no mistake where runs of a sweep share them."""
        out, name, every = [], compression.method.name, compression.schedule.compress_every
        if self.rolling_compress_every != EngineSettings.rolling_compress_every:
            if every:
                out.append(
                    f"rolling_compress_every has no effect beside compress_every={every}, which cuts documents too"
                )
            elif not compression.method.compresses:
                out.append(f"rolling_compress_every has no effect: method={name} evicts nothing")
        if not compression.lossy:
            if self.tail_tokens != EngineSettings.tail_tokens:
                out.append(
                    f"tail_tokens={self.tail_tokens} has no effect: method={name} compresses nothing before them"
                )
            if not self.question_in_prompt:
                out.append(
                    f"question_in_prompt=False has no effect: method={name} compresses nothing before the question"
                )
        return out

    def check(self, method: base.Method) -> None:
        """Raises UserError for settings that do nothing, or nothing sensible, with this method."""
        for name in ("prefill_chunk", "prefill_evict"):
            if getattr(self, name) is not None and not method.uses_cache:
                raise UserError(f"{name}={getattr(self, name)} has no effect: method={method.name} has no cache")
        if self.fidelity and not method.uses_cache:
            raise UserError(
                f"fidelity=True compares a cache with the full one, and method={method.name} has none; method=full "
                "gives the noise of the comparison itself"
            )
        if self.prefill_evict is None or method.evicts_in_prefill:
            return
        if not method.compresses:
            raise UserError(
                f"prefill_evict={self.prefill_evict} has no effect: method={method.name} evicts nothing; "
                f"prefill_chunk={self.prefill_evict} feeds the prompt in chunks"
            )
        online = ", ".join(name for name in base.available() if base.load(name).evicts_in_prefill)
        raise UserError(
            f"prefill_evict={self.prefill_evict} would cut in the middle of the prompt, where method={method.name} is "
            "defined by its end: each chunk's own last tokens would vote, which is another method. Use "
            f"prefill_chunk={self.prefill_evict} for the same answers in less memory, or one of: {online}"
        )
