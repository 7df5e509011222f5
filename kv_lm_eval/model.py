"""KVCompressedLM: lm-eval's Hugging Face model over a compressed KV cache, `lm_eval --model kvcompressed`.

Translates lm-eval's words into the engine's; holds no KV arithmetic. Loading, dtypes, chat templates, stop strings
and collation are inherited from lm-eval's `hf` model unchanged, and method=full gives the same answers as `hf`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from kv_lm_eval import config, identity, loading, quiet, saving, tiny, versions
from kv_lm_eval.cache import static_ring
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine import adapter
from kv_lm_eval.engine.check import Roads, wrap
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.forward import logits_of
from kv_lm_eval.engine.lent import as_found, our_attention, see_last, without_cache
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.compression import CompressionLog
from kv_lm_eval.metrics.memory import PeakMemory
from kv_lm_eval.requests import boundaries, choices, closing, generation, request_cache, samples
from kv_lm_eval.requests.documents import score_requests
from kv_lm_eval.requests.halving import Halving
from kv_lm_eval.requests.own_keys import OwnKeys
from kv_lm_eval.requests.run import Run, log

HFLM_KEYS = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


@register_model("kvcompressed")
class KVCompressedLM(HFLM):
    """A causal LM with a selectable compressed KV cache.

    Args (--model_args, beside those of lm-eval's `hf`):
        pretrained: hub name, folder, a loaded model, or "kv-tiny" for the embedded model.
        method: a name from `kv-lm-eval methods`, or path/to/file.py:Class; its settings follow as flat keys, or
            together as compression={...} (a dict, a JSON string or a YAML file).
        tail_tokens, rolling_compress_every, overlong, question_in_prompt, question_field, prefill_chunk,
            prefill_evict, compile: see `config.EngineSettings`.

    Raises:
        UserError: before any weights are loaded for settings; after loading for a model the self-check refuses.
    """

    AUTO_MODEL_CLASS = loading.WholeModels

    def __init__(self, pretrained: Any = None, **kwargs: Any) -> None:
        self.compression, self.engine, rest = config.parse(kwargs, pass_through=HFLM_KEYS)
        if pretrained is None:
            raise UserError("which model? Add pretrained=NAME to --model_args (pretrained=kv-tiny is embedded)")
        config.check_pretrained(pretrained)
        saving.check_newest()
        if self.engine.compile:
            static_ring.check(self.compression)
        rest["device"] = rest.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if rest.pop("backend", "default") == "seq2seq":
            raise UserError("backend=seq2seq: only causal language models have the KV cache that is compressed here")
        if rest.get("attn_implementation") not in (None, "sdpa", "eager") and self.compression.method.uses_cache:
            log.warning(
                "attn_implementation=%s is not used: kvcompressed brings its own attention",
                rest.pop("attn_implementation"),
            )
        self.arguments = {"pretrained": pretrained, **rest}
        self._without_embedding: dict[int, str] = {}
        self._name = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "model")
        self.compression_log = CompressionLog()
        self._halving = Halving(log)
        self._warmed_up: set[str] = set()
        self._request_cache: Any = None
        self._own_keys: OwnKeys | None = None
        self._from_request_cache = 0
        self._told = False  # whether an evaluation has ended since the log was begun
        samples.install()
        resolved = tiny.resolve(pretrained) if isinstance(pretrained, str) else pretrained
        with loading.loading(resolved, rest):
            super().__init__(resolved, backend="causal", **rest)
        self._without_embedding = loading.check_loaded(self._causal_lm, self.tokenizer)
        # Lengths are checked here, and a document may have any: no warning that the model would fail.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._set_ranks()
        method = self.compression.method
        windowed = method.recomputed_tokens is not None
        adapter.check(self.model, self._causal_lm, method.uses_cache or windowed, method.name)
        if method.uses_cache:
            evict = self.engine.prefill_evict
            chunk = evict or self.engine.prefill_chunk
            roads = Roads(chunk is not None, not self.engine.question_in_prompt, self.engine.compile)
            with as_found(self._causal_lm):
                self.facts = wrap(self._causal_lm, self.compression, roads)
            self._new_cache = partial(make_cache, self.compression, self.facts, chunk, evict is not None)
            self._decoder = Decoder(self._causal_lm) if self.engine.compile else None
            for message in self.compression.warnings(self.facts):
                log.warning(message)
        for message in self.engine.warnings(self.compression):
            log.warning(message)
        self._memory = PeakMemory({p.device for p in self._causal_lm.parameters()})
        if self.compression.lossy and self.engine.tail_tokens == 0:
            log.warning(
                "tail_tokens=0: the first token of every continuation is scored from the uncompressed prompt, so "
                "one-token choices will show exactly no effect of a compression after the prefill"
            )
        if untried := versions.in_use().get("untried"):
            log.warning("%s: the self-check has passed, the tests have not been run with it", untried)
        log.info("kvcompressed: %s on %s", self.settings, self._name)

    @property
    def _causal_lm(self) -> transformers.PreTrainedModel:
        """The transformers model itself, below PEFT."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides an answer beside the model: method, settings after defaults, engine settings."""
        return {**self.compression.settings(), **vars(self.engine)}

    @contextmanager
    def _model_in_use(self, generating: bool = False) -> Iterator[None]:
        """Around each call of lm-eval's: what the method needs on the model object, which others may use between."""
        with ExitStack() as put_on:
            if self.compression.method.uses_cache:
                put_on.enter_context(our_attention(self._causal_lm))
            elif generating:
                put_on.enter_context(without_cache(self.model))
                if (length := self.compression.method.recomputed_tokens) is not None:
                    put_on.enter_context(see_last(self._causal_lm, length))
            yield

    def _set_ranks(self) -> None:
        """lm-eval sets ranks only with several local GPUs; CPU ranks and one GPU a node would repeat the whole job."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    # ------------------------------------------------------------------------------------ requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with self._model_in_use(generating=True):
            return generation.generate(self._run("generate_until", requests), disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if getattr(self, "enable_thinking", False):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # which refuses it
        run, stock = self._run("loglikelihood", requests), super()._loglikelihood_tokens
        with self._model_in_use():
            return list(choices.score(run, choices.encode(run, disable_tqdm), disable_tqdm, stock))

    def _loglikelihood_tokens(
        self, requests: list[choices.Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        run, stock = self._run("loglikelihood", []), super()._loglikelihood_tokens
        with self._model_in_use():
            return list(choices.score(run, requests, disable_tqdm, stock))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        with self._model_in_use():
            return list(score_requests(self._run("loglikelihood_rolling", requests), disable_tqdm))

    def _run(self, kind: str, requests: Sequence[Instance]) -> Run:
        self._begin()
        cached = self.compression.method.uses_cache
        return Run(
            kind=kind,
            requests=requests,
            lm=self,
            causal_lm=self._causal_lm,
            name=str(self._name),
            compression=self.compression,
            engine=self.engine,
            settings=self.settings,
            new_cache=self._new_cache if cached else None,
            facts=self.facts if cached else None,
            decoder=self._decoder if cached else None,
            last_logits=self._last_logits,
            tokens_from=self._tokens_from,
            log=self.compression_log,
            halving=self._halving,
            memory=self._memory,
            warmed_up=self._warmed_up,
            gains_by_batches=self._gains_by_batches,
            own_keys=self._own_keys,
        )

    # ------------------------------------------------------------------------------------ the model

    @property
    def _gains_by_batches(self) -> bool:
        """A CPU computes rows one after the other anyway."""
        return self.device.type != "cpu"

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """batch_size=auto of lm-eval's own scoring, which method=no_cache uses."""
        return super()._detect_batch_size(requests, pos) if self._gains_by_batches else 1

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        with self._model_in_use():
            return self._last_logits(inps, inps.shape[1])

    def _last_logits(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """One plain forward of right-padded rows [B, q] from an empty cache, uncut: the last logits [B, count, V]."""
        cache = self._new_cache() if self.compression.method.uses_cache else None
        if cache is not None:
            cache.set(mode="hold")
            if self.facts.border is not None and self.facts.rope is not None:
                self.facts.rope.forget(self.device)
        dtype = self.mixed_precision_dtype
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return logits_of(self.model, ids, cache=cache, keep=count)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return str(super().apply_chat_template(chat_history, add_generation_prompt))
        except ValueError as error:
            if getattr(self.tokenizer, "chat_template", None):
                raise
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} has no chat template, as of a base model; leave out "
                "--apply_chat_template, or give tokenizer=NAME in --model_args with one that has"
            ) from error

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        return self._with_embeddings(ids, string)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        for row, string in zip(ids.tolist(), strings, strict=True):
            self._with_embeddings(row, string)
        return ids, mask

    def _with_embeddings(self, ids: list[int], text: str) -> list[int]:
        if self._without_embedding and (found := [i for i in ids if i in self._without_embedding]):
            raise UserError(
                f"a prompt holds the token {self._without_embedding[found[0]]!r} ({found[0]}), for which the model has "
                f"no embedding; resize the embeddings, or change the prompt: {text[:60]!r}"
            )
        return ids

    def _tokens_from(self, text: str, start: int) -> int:
        """Tokens of a text from its character `start` on."""
        if not self.tokenizer.is_fast:
            return boundaries.tokens_by_prefix(self.tok_encode, text, start)
        special = self.add_bos_token is not False
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return boundaries.tokens_by_offsets(encoded["offset_mapping"], start)

    # ------------------------------------------------------------------------------------ results and caches

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around one evaluation of lm-eval's, whose statistics are its own, also where one before it failed."""
        self._begin()
        try:
            yield
        finally:
            self._told = True

    def _begin(self) -> None:
        """What has been told, or belongs to an evaluation that has ended, is not counted again."""
        if self._told:
            self.compression_log.restart()
            self._from_request_cache, self._told = 0, False

    def barrier(self) -> None:
        """Every rank passes here after each kind of request: rank 0 takes the others' records, which let go of them."""
        if self.world_size > 1:
            gathered = self.gather_object((self.compression_log.records, self._answers_taken())) or []
            self.compression_log.records = [r for records, _ in gathered for r in records]
            self._from_request_cache += sum(answers for _, answers in gathered)
        super().barrier()

    def _answers_taken(self) -> int:
        """Requests that this rank's --use_cache file has answered since the last time this was asked."""
        taken = getattr(self._request_cache, "answers", 0)
        if self._request_cache is not None:
            self._request_cache.answers = 0
        return taken

    def get_model_info(self) -> dict[str, Any]:
        """Goes into results["config"]: what was compressed and what was not, with all settings and versions."""
        summary = self.compression_log.summary()
        self._from_request_cache += self._answers_taken()
        summary["from_request_cache"] = self._from_request_cache
        closing.say(log, self.compression, summary)
        self._told = True
        return {
            **super().get_model_info(),
            "kv_compression": self.settings,
            "kv_stats": summary,
            "kv_versions": versions.in_use(),
        }

    def fingerprint(self) -> str:
        """Hash of all that decides an answer (identity.py)."""
        return identity.digest(identity.of_loaded(self))

    def set_cache_hook(self, cache_hook: Any) -> None:
        """--use_cache: answers of each model and method go into a table of their own in lm-eval's sqlite file.

        lm-eval's key holds the request only, so that without this a compressed run would be answered from a full one.
        """
        if cache_hook.dbdict is not None:
            request_cache.use_own_table(cache_hook.dbdict, self.fingerprint())
            self._request_cache = cache_hook.dbdict
            samples.mark_what_is_read(cache_hook.dbdict)
        own = cache_hook.dbdict is not None and not self.engine.question_in_prompt and self.compression.lossy
        self._own_keys = OwnKeys(cache_hook.dbdict) if own else None
        super().set_cache_hook(cache_hook)


quiet.install()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
