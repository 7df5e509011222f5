"""KVCompressedLM: lm-eval's Hugging Face model over a compressed KV cache, `lm_eval --model kvcompressed`.

Translates lm-eval's words into the engine's; holds no KV arithmetic. Loading, dtypes, chat templates, stop strings
and collation are inherited from lm-eval's `hf` model unchanged, and method=full gives the same answers as `hf`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from kv_lm_eval import config, identity, loading, quiet, saving, tiny, trackers, versions
from kv_lm_eval.cache import static_ring
from kv_lm_eval.engine import adapter
from kv_lm_eval.engine.forward import below_adapter, logits_of
from kv_lm_eval.metrics.compression import CompressionLog
from kv_lm_eval.metrics.memory import PeakMemory
from kv_lm_eval.requests import choices, generation, remarks, request_cache, samples
from kv_lm_eval.requests.answers_of_full import AnswersOfFull
from kv_lm_eval.requests.documents import score_requests
from kv_lm_eval.requests.halving import Halving
from kv_lm_eval.requests.own_keys import OwnKeys
from kv_lm_eval.requests.run import Run, log
from kv_lm_eval.requests.served import served

HFLM_KEYS = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


@register_model("kvcompressed")
class KVCompressedLM(HFLM):
    """A causal LM with a selectable compressed KV cache.

    Args (--model_args, beside those of lm-eval's `hf`):
        pretrained: hub name, folder, a loaded model, or "kv-tiny" for the embedded model.
        method: a name from `kv-lm-eval methods`, or path/to/file.py:Class; its settings follow as flat keys, or
            together as compression={...} (a dict, a JSON string or a YAML file).
        tail_tokens, rolling_compress_every, overlong, question_in_prompt, question_field, prefill_chunk,
            prefill_evict, compile, fidelity: see `settings.EngineSettings`.

    Raises:
        UserError: before any weights are loaded for settings; after loading for a model the self-check refuses.
    """

    AUTO_MODEL_CLASS = loading.WholeModels

    def __init__(self, pretrained: Any = None, **kwargs: Any) -> None:
        rest = self.settle(pretrained, kwargs)
        saving.check_newest()
        self._without_embedding: dict[int, str] = {}  # known when the model is loaded
        self._name = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "model")
        samples.install()
        quiet.install()
        trackers.install()
        resolved = tiny.resolve(pretrained) if isinstance(pretrained, str) else pretrained
        with loading.loading(resolved, rest):
            super().__init__(resolved, backend="causal", **rest)
        self._without_embedding = loading.check_loaded(self.causal_lm, self.tokenizer)
        # Lengths are checked here, and a document may have any: no warning that the model would fail.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._set_ranks()
        self._memory = PeakMemory({p.device for p in self.causal_lm.parameters()})
        self.take_up()

    def settle(self, pretrained: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Reads and checks the settings; returns what is left for lm-eval's hf model."""
        self.compression, self.engine, rest = config.parse(kwargs, pass_through=HFLM_KEYS)
        config.check_pretrained(pretrained)
        if self.engine.compile:
            static_ring.check(self.compression)
        loading.settle(rest, own_attention=self.compression.method.uses_cache)
        self.arguments = {"pretrained": pretrained, **rest}
        return rest

    def take_up(self) -> None:
        """Puts the settings to use on the loaded model, with everything that belongs to one LM object empty."""
        self.compression_log = CompressionLog()
        self.beside: list[KVCompressedLM] = []  # under which the same requests are answered on the way
        self._halving = Halving(log)
        self._warmed_up: set[str] = set()
        self._own_keys: OwnKeys | None = None
        self._answers_of_full = AnswersOfFull() if self.engine.fidelity else None
        self.made = request_cache.Made()
        method = self.compression.method
        windowed = method.recomputed_tokens is not None
        adapter.check(self.model, self.causal_lm, method.uses_cache or windowed, method.name)
        found = served(self.causal_lm, self.tokenizer, self.compression, self.engine, self.mixed_precision_dtype)
        self.facts, self._new_cache, self._decoder = found
        remarks.at_start(self._run())

    @property
    def causal_lm(self) -> transformers.PreTrainedModel:
        """The transformers model itself, below PEFT."""
        return below_adapter(self.model)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides an answer beside the model: method, settings after defaults, engine settings."""
        return self._run().settings

    def _set_ranks(self) -> None:
        """lm-eval sets ranks only with several local GPUs; CPU ranks and one GPU a node would repeat the whole job."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    # ------------------------------------------------------------------------------------ requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with self._running("generate_until", requests) as run:
            return generation.generate(run, disable_tqdm, self._runs_beside(run))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if getattr(self, "enable_thinking", False):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # which refuses it
        stock = super()._loglikelihood_tokens
        with self._running("loglikelihood", requests) as run:
            encoded = choices.encode(run, disable_tqdm, self._encode_pair)
            return list(choices.score(run, encoded, disable_tqdm, stock, self._runs_beside(run)))

    def _loglikelihood_tokens(
        self, requests: list[choices.Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        stock = super()._loglikelihood_tokens
        with self._running("loglikelihood", []) as run:
            return list(choices.score(run, requests, disable_tqdm, stock))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        with self._running("loglikelihood_rolling", requests) as run:
            return list(score_requests(run, disable_tqdm))

    @contextmanager
    def _running(self, kind: str, requests: Sequence[Instance]) -> Iterator[Run]:
        self.compression_log.begin()
        run = self._run(kind, requests)
        with run.model_in_use():
            yield run

    def _runs_beside(self, run: Run) -> list[Run]:
        """The same requests to the LM objects that are answered on the way."""
        return [other._run(run.kind, run.requests) for other in self.beside]

    def _run(self, kind: str = "", requests: Sequence[Instance] = ()) -> Run:
        return Run(
            kind=kind,
            requests=requests,
            lm=self,
            name=str(self._name),
            compression=self.compression,
            engine=self.engine,
            new_cache=self._new_cache,
            facts=self.facts,
            decoder=self._decoder,
            last_logits=self._last_logits,
            log=self.compression_log,
            halving=self._halving,
            memory=self._memory,
            warmed_up=self._warmed_up,
            own_keys=self._own_keys,
            answers_of_full=self._answers_of_full,
        )

    # ------------------------------------------------------------------------------------ the model

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """batch_size=auto of lm-eval's own scoring, which method=no_cache uses."""
        return super()._detect_batch_size(requests, pos) if self._run().gains_by_batches else 1

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        with self._run().model_in_use():
            return self._last_logits(inps, inps.shape[1])

    def _last_logits(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """One plain forward of right-padded rows [B, q] from an empty cache, uncut: the last logits [B, count, V]."""
        cache = self._new_cache() if self._new_cache is not None else None
        if cache is not None and self.facts is not None:
            cache.set(mode="hold")
            if self.facts.border is not None and self.facts.rope is not None:
                self.facts.rope.forget(self.device)
        with torch.inference_mode():
            return logits_of(self.model, ids, cache=cache, keep=count)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        with loading.chat_template(self.tokenizer):
            return str(super().apply_chat_template(chat_history, add_generation_prompt))

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        loading.check_embeddings(ids, self._without_embedding, string)
        return ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        for row, string in zip(ids.tolist(), strings, strict=True):
            loading.check_embeddings(row, self._without_embedding, string)
        return ids, mask

    # ------------------------------------------------------------------------------------ results and caches

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around one evaluation of lm-eval's, whose statistics are its own, also where one before it failed."""
        self.compression_log.begin()
        try:
            yield
        finally:
            self.compression_log.end()

    def barrier(self) -> None:
        """Every rank passes here after each kind of request: rank 0 takes the others' records, which let go of them."""
        if self.world_size > 1:
            self.compression_log.take_over(self.gather_object(self.compression_log.hand_over()) or [])
        super().barrier()

    def get_model_info(self) -> dict[str, Any]:
        """Goes into results["config"]: what was compressed and what was not, with all settings and versions."""
        summary = self.compression_log.summary()
        remarks.at_end(self.compression, summary)
        self.compression_log.end()
        ours = {"kv_compression": self.settings, "kv_stats": summary}
        about = {"kv_versions": versions.in_use(), "kv_format": versions.RESULTS_FORMAT}
        return {**super().get_model_info(), **ours, **about}

    def fingerprint(self) -> str:
        """Hash of all that decides an answer (identity.py)."""
        return identity.digest(identity.of_loaded(self))

    def set_cache_hook(self, cache_hook: Any) -> None:
        """--use_cache: answers of each model and method go into a table of their own in lm-eval's sqlite file.

        lm-eval's key holds the request only, so that without this a compressed run would be answered from a full one.
        """
        if cache_hook.dbdict is not None:
            answered = self.compression_log.answered_from_cache
            request_cache.use_own_table(cache_hook.dbdict, self.fingerprint(), answered, self.made)
            samples.mark_what_is_read(cache_hook.dbdict)
            if self._answers_of_full is not None:
                self._answers_of_full.keep_in(cache_hook.dbdict, identity.digest(identity.of_full_cache(self)))
        own = cache_hook.dbdict is not None and self._run().question_first
        self._own_keys = OwnKeys(cache_hook.dbdict) if own else None
        super().set_cache_hook(cache_hook)
