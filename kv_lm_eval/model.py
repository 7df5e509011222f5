"""KVCompressedLM: lm-eval's Hugging Face model over a compressed KV cache, `lm_eval --model kvcompressed`.

Translates lm-eval's words into the engine's; holds no KV arithmetic. Loading, dtypes, chat templates, stop strings
and collation are inherited from lm-eval's `hf` model unchanged, and method=full gives the same answers as `hf`.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from kv_lm_eval import config, identity, loading, quiet, saving, tiny, versions
from kv_lm_eval.cache import static_ring
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine import adapter
from kv_lm_eval.engine.check import Roads, wrap
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.forward import generate_with, logits_of
from kv_lm_eval.engine.generate import check_generation_settings, decode_steps, noting_first_token
from kv_lm_eval.engine.lent import as_found, our_attention, see_last, without_cache
from kv_lm_eval.engine.prefill import prefill
from kv_lm_eval.engine.question import alike
from kv_lm_eval.engine.start import start
from kv_lm_eval.errors import OUT_OF_MEMORY, UserError
from kv_lm_eval.metrics.compression import CompressionLog, uncut
from kv_lm_eval.metrics.latency import Stopwatch, Timing
from kv_lm_eval.metrics.memory import PeakMemory
from kv_lm_eval.progress import Bar
from kv_lm_eval.requests import boundaries, choices, closing, request_cache, samples
from kv_lm_eval.requests.documents import score_requests
from kv_lm_eval.requests.halving import Halving, largest_batch

log = logging.getLogger("lm_eval.models.kvcompressed")  # below lm-eval's logger: its format, its verbosity
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
        self._tasks: dict[Any, list[str]] = {}
        self._batch_contexts: list[str] = []
        self._docs: dict[str, dict[str, Any]] = {}
        self._questions: dict[str, boundaries.Boundary] = {}
        self._out_of_memory: set[str] = set()
        self._halving = Halving(log)
        self._warmed_up: set[str] = set()
        self._request_cache: Any = None
        self._from_request_cache = 0
        self._bar: Any = None
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
        self._memory = PeakMemory({p.device for p in self._causal_lm.parameters()})
        for message in self.engine.warnings(self.compression):
            log.warning(message)
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

    # ------------------------------------------------------------------------------------ generate_until

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._tasks = defaultdict(list)
        for request in requests:
            self._tasks[request.args[0]].append(request.task_name or "")
        self._docs = {r.args[0]: r.doc for r in requests if isinstance(r.doc, dict)}
        self._out_of_memory.clear()
        prompts, room = [self.tok_encode(r.args[0]) for r in requests], [self._room(r) for r in requests]
        self._check_prompts(prompts, room)
        self._find_questions(requests)
        full_length = (p + p[-1:] * (self.max_length - n) for p, n in zip(prompts, room, strict=True))
        self._longest: list[int] = max(full_length, key=len, default=[])
        hidden = disable_tqdm or self.rank != 0
        bar = Bar(total=len(requests), disable=hidden, desc="Running generate_until requests")
        with bar as self._bar, self._model_in_use(generating=True):
            answers = super().generate_until(requests, disable_tqdm=True)
        return [
            OUT_OF_MEMORY if r.args[0] in self._out_of_memory else a for r, a in zip(requests, answers, strict=True)
        ]

    def _room(self, request: Instance) -> int:
        """Tokens that a prompt may have so that its answer still fits the model's maximum."""
        gen_kwargs = request.args[1]
        return self.max_length - int(
            gen_kwargs.get("max_gen_toks", gen_kwargs.get("max_new_tokens", self.max_gen_toks))
        )

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        if self._without_embedding and (found := [i for i in ids if i in self._without_embedding]):
            raise UserError(
                f"a prompt holds the token {self._without_embedding[found[0]]!r} ({found[0]}), for which the model has "
                f"no embedding; resize the embeddings, or change the prompt: {string[:60]!r}"
            )
        return ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._batch_contexts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """One batch of lm-eval's, in parts that fit the memory; a document that `takes_failures` may fail alone."""
        texts, mask, width = self._batch_contexts, kwargs.pop("attention_mask"), context.shape[1]
        docs, lengths = [self._docs.get(text, {}) for text in texts], mask.sum(1).tolist()
        if self._bar is not None:
            self._bar.set_postfix_str("; ".join(dict.fromkeys(str(d.get("progress_label", "")) for d in docs)))

        def work(rows: Sequence[int]) -> torch.Tensor:
            self._batch_contexts, padding = [texts[i] for i in rows], width - max(lengths[i] for i in rows)
            part, part_mask = context[list(rows), padding:], mask[list(rows), padding:]
            out = self._generate(part, max_length - padding, stop, attention_mask=part_mask, **kwargs)
            return out[:, width - padding :]

        def length(i: int) -> int:
            return lengths[i] + max_length - width

        def forgive(i: int) -> bool:
            return bool(docs[i].get("takes_failures"))

        new: dict[int, torch.Tensor] = {}
        tails = [
            min(n, self._questions[text].tail_tokens) for n, text in zip(lengths, texts, strict=True) if self._questions
        ]
        for together in alike(tails, self.compression.schedule) if tails else [range(len(texts))]:
            for rows, answer in self._halving.run(together, work, length, forgive):
                if answer is None:
                    self._out_of_memory.add(texts[rows[0]])
                    label, tokens = docs[rows[0]].get("progress_label", "a prompt"), lengths[rows[0]]
                    log.warning("out of memory: %s (%d tokens) is not scored; the rest goes on", label, tokens)
                    answer = context.new_zeros(1, 0)
                new.update(zip(rows, answer.split(1), strict=True))
        self._batch_contexts = texts
        longest = max(n.shape[1] for n in new.values())
        padded = [
            F.pad(n, (0, longest - n.shape[1]), value=self.tokenizer.pad_token_id) for _, n in sorted(new.items())
        ]
        if self._bar is not None:
            self._bar.update(len(docs))
        return torch.cat([context, torch.cat(padded)], dim=1)

    def _generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        texts, mask = self._batch_contexts, kwargs.pop("attention_mask")
        tasks = [self._tasks[s][0] if self._tasks.get(s) else "" for s in texts]
        questions = [self._questions[text] for text in texts] if self._questions else None
        ids, watch, cache = context, self._stopwatch(), None
        if self.compression.method.uses_cache:
            check_generation_settings(kwargs)
            if self._decoder is not None and int(kwargs.get("num_beams") or 1) > 1:
                raise UserError(
                    f"num_beams={kwargs['num_beams']} with compile=True: beams move rows about, which the compiled "
                    "step does not; leave one of them out"
                )
        rows = [row[-n:] for row, n in zip(context.tolist(), mask.sum(1).tolist(), strict=True)]
        if self.compression.method.uses_cache:
            tails = [q.tail_tokens for q in questions] if questions else None
            with self._autocast():
                new_cache, pad = partial(self._timed_cache, watch), self.tokenizer.pad_token_id
                cache, ids, mask = start(self.model, new_cache, rows, tails, pad)
            beams = max(int(kwargs.get(name) or 1) for name in ("num_beams", "num_return_sequences"))
            if beams > 1 and cache.seen:
                cache.batch_repeat_interleave(beams)
            max_length += ids.shape[1] - context.shape[1]
        steps_before = len(cache.history) if cache is not None else 0
        fast: AbstractContextManager[None] = nullcontext()
        if cache is not None and self._decoder is not None:
            fast = self._decoder.decoding(cache, max_length - ids.shape[1])
        with noting_first_token(self._causal_lm, watch.first_token), fast:
            held = generate_with(cache)
            out = super()._model_generate(ids, max_length, stop, attention_mask=mask, **held, **kwargs)
        watch.end()
        new = out[:, ids.shape[1] :]
        ends = kwargs.get("eos_token_id", self._causal_lm.generation_config.eos_token_id)
        steps = [
            decode_steps(row, stop, ends if isinstance(ends, list) else [ends], self.tok_decode) for row in new.tolist()
        ]
        sequences = out.shape[0] // len(tasks)  # return sequences of one prompt
        new_tokens = [n + 1 for n in steps[::sequences]]
        timings = watch.timings(len(tasks), self._first_of("generate_until"), new_tokens, new.shape[1])
        lengths = mask.sum(1).tolist()
        if cache is None:
            self._log_uncached(tasks, texts, "generate_until", lengths, timings)
            return out
        beams = len(cache.seen) // len(steps)
        at = [steps_before + n for n in steps for _ in range(beams)]
        end = every_row(cache.snapshot(at), sequences * beams)
        prefilled = cache.prefill_end or end
        prefilled = {**every_row(prefilled, len(prefilled["seen"]) // len(tasks)), "seen": lengths}
        end = {**end, "timing": timings, **(boundaries.rows(questions) if questions else {})}
        self.compression_log.add_batch(tasks, texts, "generate_until", prefilled, end)
        return torch.cat([context.repeat_interleave(sequences, dim=0), new], dim=1)

    # ------------------------------------------------------------------------------------ questions, times, memory

    def _find_questions(self, requests: list[Instance]) -> None:
        """With question_in_prompt=False: where each prompt's question begins; raises before any work is done."""
        self._questions = {}
        if self.engine.question_in_prompt or not self.compression.lossy:
            return
        self._questions = boundaries.find_all(requests, self.engine.question_field, self._tokens_from)

    def _tokens_from(self, text: str, start: int) -> int:
        """Tokens of a text from its character `start` on."""
        if not self.tokenizer.is_fast:
            return boundaries.tokens_by_prefix(self.tok_encode, text, start)
        special = self.add_bos_token is not False
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return boundaries.tokens_by_offsets(encoded["offset_mapping"], start)

    def _stopwatch(self) -> Stopwatch:
        return Stopwatch(self._memory, self.device)

    def _timed_cache(self, watch: Stopwatch) -> CompressedCache:
        cache = self._new_cache()
        cache.around_cut = watch.around_cut
        return cache

    def _first_of(self, kind: str) -> bool:
        """Whether this is the first batch of its kind, which warms the device up."""
        first = kind not in self._warmed_up
        self._warmed_up.add(kind)
        return first

    @property
    def _gains_by_batches(self) -> bool:
        """A CPU computes rows one after the other anyway."""
        return self.device.type != "cpu"

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """batch_size=auto of generate_until: prompts as long as the longest with its answer, prefilled and cut."""
        if not self._gains_by_batches:
            return 1

        def attempt(n: int) -> None:
            with torch.inference_mode(), self._autocast():
                if self.compression.method.uses_cache:
                    prefill(self.model, self._new_cache, [self._longest] * n)
                else:
                    logits_of(self.model, torch.tensor([self._longest] * n, device=self.device), keep=1)

        return largest_batch(attempt, self.max_batch_size)

    # ------------------------------------------------------------------------------------ loglikelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._tasks = {"order": [r.task_name or "" for r in requests]}
        self._find_questions(requests)
        with self._model_in_use():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self._check_prompts([r[1] + r[2] for r in requests], [self.max_length + 1] * len(requests))
        if self.compression.method.uses_cache:
            return choices.score_grouped(self, requests, disable_tqdm)
        texts = {r[0][0] if r[0] else "": i for i, r in enumerate(requests)}
        tasks, lengths = zip(*((self._tasks["order"][i], len(requests[i][1])) for i in texts.values()), strict=True)
        self._log_uncached(list(tasks), list(texts), "loglikelihood", list(lengths))
        if (length := self.compression.method.recomputed_tokens) is not None:
            return choices.score_recomputed(self, requests, length, disable_tqdm)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        with self._model_in_use():
            return self._last_logits(inps, inps.shape[1])

    def _last_logits(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """One plain forward of right-padded rows [B, q] from an empty cache, uncut: the last logits [B, count, V]."""
        cache = self._new_cache() if self.compression.method.uses_cache else None
        if cache is not None:
            cache.mode = "hold"
        with torch.inference_mode(), self._autocast():
            return logits_of(self.model, ids, cache=cache, keep=count)

    # ------------------------------------------------------------------------------------ loglikelihood_rolling

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._tasks = {}
        with self._model_in_use():
            return list(score_requests(self, requests, disable_tqdm))

    # ------------------------------------------------------------------------------------ input checks

    def _check_prompts(self, prompts: list[list[int]], room: list[int]) -> None:
        """Refuses empty and over-long prompts before any work is done."""
        if empty := sum(not p for p in prompts):
            raise UserError(f"{empty} of {len(prompts)} prompts are empty (0 tokens): there is nothing to condition on")
        over = [len(p) for p, r in zip(prompts, room, strict=True) if len(p) > r]
        if over and self.engine.overlong == "error":
            raise UserError(
                f"{len(over)} of {len(prompts)} prompts are longer than the model's maximum of "
                f"{self.max_length} tokens "
                f"leaves room for (longest {max(over)}); they would lose their beginning. Set "
                "max_length=... if the model can "
                "take more, or overlong=truncate_left to cut them as lm-eval's hf model does."
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )

    # ------------------------------------------------------------------------------------ results and caches

    def _log_uncached(
        self,
        tasks: list[str],
        prompts: Sequence[Hashable],
        kind: str,
        lengths: list[int],
        timings: list[Timing] | None = None,
    ) -> None:
        """Records of requests that held no compressed cache: method=no_cache, and lm-eval's windows
        under method=full."""
        per_token = 0 if not self.compression.method.uses_cache else self._kv_bytes_per_token()
        snapshot = uncut(lengths, self.max_length, per_token)
        end = {**snapshot, "timing": timings} if timings else snapshot
        self.compression_log.add_batch(tasks, prompts, kind, snapshot, end)

    def _kv_bytes_per_token(self) -> int:
        cfg = self.model.config.get_text_config()
        heads = getattr(cfg, "num_key_value_heads", None) or cfg.num_attention_heads
        size = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        return 2 * self.facts.num_layers * heads * size * self.model.dtype.itemsize

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
        samples.remember(self.compression_log.by_prompt())
        return {
            **super().get_model_info(),
            "kv_compression": self.settings,
            "kv_stats": summary,
            "kv_versions": versions.in_use(),
        }

    def fingerprint(self) -> str:
        """Hash of all that decides an answer (identity.py)."""
        return identity.digest(identity.of_loaded(self))

    def _unless_out_of_memory(self, add_partial: Any) -> Any:
        def add(kind: str, request: tuple[Any, ...], answer: Any) -> None:
            if kind != "generate_until" or request[0] not in self._out_of_memory:
                add_partial(kind, request, answer)

        return add

    def set_cache_hook(self, cache_hook: Any) -> None:
        """--use_cache: answers of each model and method go into a table of their own in lm-eval's sqlite file.

        lm-eval's key holds the request only, so that without this a compressed run would be answered from a full one.
        """
        if cache_hook.dbdict is not None:
            request_cache.use_own_table(cache_hook.dbdict, self.fingerprint())
            self._request_cache = cache_hook.dbdict
            cache_hook.add_partial = self._unless_out_of_memory(cache_hook.add_partial)
        super().set_cache_hook(cache_hook)


def every_row(snapshot: dict[str, Any], step: int) -> dict[str, Any]:
    """A snapshot reduced to each step-th row."""
    return {k: v[::step] if isinstance(v, list) else v for k, v in snapshot.items()}


quiet.install()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
