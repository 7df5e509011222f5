"""KVCompressedLM: lm-eval's Hugging Face model over a compressed KV cache, `lm_eval --model kvcompressed`.

Translates lm-eval's words into the engine's; holds no KV arithmetic. Loading, dtypes, chat templates, stop strings
and collation are inherited from lm-eval's `hf` model unchanged, and method=full gives the same answers as `hf`.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kv_lm_eval import __version__, config, request_cache, tiny
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.generate import check_generation_settings, without_cache
from kv_lm_eval.engine.streaming import score_documents
from kv_lm_eval.errors import OUT_OF_MEMORY, UserError
from kv_lm_eval.metrics.compression import CompressionLog

log = logging.getLogger("lm_eval.models.kvcompressed")  # below lm-eval's logger: its format, its verbosity
HFLM_KEYS = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


@register_model("kvcompressed")
class KVCompressedLM(HFLM):
    """A causal LM with a selectable compressed KV cache.

    Args (--model_args, beside those of lm-eval's `hf`):
        pretrained: hub name, folder, a loaded model, or "kv-tiny" for the embedded model.
        method: a name from `kv-lm-eval methods`, or path/to/file.py:Class; its settings follow as flat keys, or
            together as compression={...} (a dict, a JSON string or a YAML file).
        tail_tokens, rolling_compress_every, overlong: see `config.EngineSettings`.

    Raises:
        UserError: before any weights are loaded for settings; after loading for a model the self-check refuses.
    """

    def __init__(self, pretrained: Any = None, **kwargs: Any) -> None:
        self.compression, self.engine, rest = config.parse(kwargs, pass_through=HFLM_KEYS)
        if pretrained is None:
            raise UserError("which model? Add pretrained=NAME to --model_args (pretrained=kv-tiny is embedded)")
        config.check_pretrained(pretrained)
        rest["device"] = rest.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if rest.pop("backend", "default") == "seq2seq":
            raise UserError("backend=seq2seq: only causal language models have the KV cache that is compressed here")
        if rest.get("attn_implementation") not in (None, "sdpa", "eager") and self.compression.method.uses_cache:
            log.warning(
                "attn_implementation=%s is not used: kvcompressed brings its own attention",
                rest.pop("attn_implementation"),
            )
        self._name = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "model")
        self.compression_log = CompressionLog()
        self._tasks: dict[Any, list[str]] = {}
        self._batch_contexts: list[str] = []
        self._docs: dict[str, dict[str, Any]] = {}
        self._out_of_memory: set[str] = set()
        self._bar: Any = None
        try:
            super().__init__(tiny.resolve(pretrained), backend="causal", **rest)
        except OSError as error:
            raise UserError(f"pretrained={pretrained} could not be loaded: {str(error).splitlines()[0]}") from error
        self._set_ranks()
        if self.compression.method.uses_cache:
            self.facts = wrap(self._causal_lm, self.compression)
            self._new_cache = partial(CompressedCache, self.compression, self.facts)
            for message in self.compression.method.warnings(self.facts):
                log.warning(message)
        else:
            without_cache(self._causal_lm)
        if self.compression.method.compresses and self.engine.tail_tokens == 0:
            log.warning(
                "tail_tokens=0: the first token of every continuation is scored from the uncompressed prompt, so "
                "one-token choices will show exactly no effect of a compression after the prefill"
            )
        log.info("kvcompressed: %s on %s", self.settings, self._name)

    @property
    def _causal_lm(self) -> transformers.PreTrainedModel:
        """The transformers model itself, below PEFT."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides an answer beside the model: method, settings after defaults, engine settings."""
        return {**self.compression.settings(), **vars(self.engine)}

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
        self._check_prompts([self.tok_encode(r.args[0]) for r in requests], [self._room(r) for r in requests])
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running generate_until requests") as self._bar:
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

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._batch_contexts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """One batch; where every document `takes_failures`, running out of memory costs only what does not fit."""
        docs = [self._docs.get(text, {}) for text in self._batch_contexts]
        if self._bar is not None:
            self._bar.set_postfix_str("; ".join(dict.fromkeys(str(d.get("progress_label", "")) for d in docs)))
        try:
            out = self._generate(context, max_length, stop, **kwargs)
        except torch.OutOfMemoryError:
            if not docs or not all(d.get("takes_failures") for d in docs):
                raise
            out = None
        if out is None:  # outside the handler, which keeps the failed forward's tensors alive
            out = self._row_by_row(context, max_length, stop, **kwargs)
        if self._bar is not None:
            self._bar.update(len(docs))
        return out

    def _row_by_row(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """A batch that ran out of memory, one prompt at a time; one that still does gets no token, and a mark."""
        texts, mask, width = self._batch_contexts, kwargs.pop("attention_mask"), context.shape[1]
        out = context.new_full((len(texts), max_length), self.tokenizer.pad_token_id)
        out[:, :width] = context
        for i, text in enumerate(texts):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._batch_contexts, padding = [text], width - int(mask[i].sum())
            row, row_mask = context[i : i + 1, padding:], mask[i : i + 1, padding:]
            try:
                answer = self._generate(row, max_length - padding, stop, attention_mask=row_mask, **kwargs)
                new = answer[0, row.shape[1] :]
                out[i, width : width + len(new)] = new
            except torch.OutOfMemoryError:
                self._out_of_memory.add(text)
                label = self._docs[text].get("progress_label", "a prompt")
                log.warning("out of memory: %s (%d tokens) is not scored; the rest goes on", label, row.shape[1])
        self._batch_contexts = texts
        return out

    def _generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        tasks = [self._tasks[s][0] if self._tasks.get(s) else "" for s in self._batch_contexts]
        if not self.compression.method.uses_cache:
            out = super()._model_generate(context, max_length, stop, **kwargs)
            lengths = kwargs["attention_mask"].sum(1).tolist()
            self._log_uncached(tasks, self._batch_contexts, "generate_until", lengths)
            return out
        check_generation_settings(kwargs)
        cache = self._new_cache()
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)
        rows = out.shape[0] // len(tasks)  # beams or return sequences of one prompt
        steps = [self._decode_steps(ids, stop) for ids in out[:, context.shape[1] :].tolist()]
        beams = len(cache.seen) // len(steps)
        end = every_row(cache.snapshot([n for n in steps for _ in range(beams)]), rows * beams)
        prefill = every_row(cache.prefill_end or end, rows * beams)
        self.compression_log.add_batch(tasks, self._batch_contexts, "generate_until", prefill, end)
        return out

    def _decode_steps(self, new_ids: list[int], stop: list[str]) -> int:
        """Decode steps that this answer took by itself: a batch goes on until its last row has met its stop."""
        low, high = 1, len(new_ids)
        while low < high:  # the shortest beginning that holds a stop: once it does, all longer ones do
            middle = (low + high) // 2
            text = self.tok_decode(new_ids[:middle], skip_special_tokens=False)
            low, high = (low, middle) if any(s in text for s in stop if s) else (middle + 1, high)
        return low - 1

    # ------------------------------------------------------------------------------------ loglikelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._tasks = {"order": [r.task_name or "" for r in requests]}
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if not self.compression.method.uses_cache:
            if override_bs is None:  # with it, these are windows of a document, which is counted as one request
                contexts = {tuple(r[1]): task for r, task in zip(requests, self._tasks["order"], strict=True)}
                self._log_uncached(list(contexts.values()), list(contexts), "loglikelihood", list(map(len, contexts)))
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        return self._score_grouped(requests, disable_tqdm, override_bs)

    def _score_grouped(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        """Groups requests by context, longest first, and scores each group's continuations over one prefill."""
        rolling = override_bs is not None
        if not rolling:
            self._check_prompts([r[1] + r[2] for r in requests], [self.max_length + 1] * len(requests))
        order = self._tasks.get("order", [])  # empty when called directly, not through loglikelihood()
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            both = (context + continuation)[-(self.max_length + 1) :]
            groups[tuple(both[: len(both) - len(continuation)])].append(i)
        keys = sorted(groups, key=lambda c: (-len(c), c))
        if empty := [i for c in keys if not c for i in groups[c]]:
            raise UserError(
                f"request {empty[0]} has an empty context after truncation to {self.max_length} "
                "tokens: its continuation "
                "alone is longer than the model's maximum"
            )
        size = override_bs or self._contexts_per_batch(requests)
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="kvcompressed loglikelihood")
        for start in range(0, len(keys), size):
            batch = keys[start : start + size]
            continuations = [[requests[i][2] for i in groups[c]] for c in batch]
            with self._autocast():
                scores, cache = score_continuations(
                    self.model, self._new_cache, batch, continuations, self.engine.tail_tokens, self.softmax_dtype
                )
            for key, group in zip(batch, scores, strict=True):
                for i, answer in zip(groups[key], group, strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
            end = cache.snapshot()
            if not rolling:
                tasks = [order[groups[c][0]] if order else "" for c in batch]
                prefill = {**(cache.prefill_end or end), "seen": [len(c) for c in batch]}
                self.compression_log.add_batch(tasks, batch, "loglikelihood", prefill, end)
            bar.update(sum(len(groups[c]) for c in batch))
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def _contexts_per_batch(self, requests: list[Any]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = sorted(requests, key=lambda r: -len(r[1] + r[2]))
        return self._detect_batch_size(longest, 0)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """One plain forward (batch size detection): through our attention, without compression."""
        if not self.compression.method.uses_cache:
            return super()._model_call(inps, attn_mask, labels)
        with torch.inference_mode(), self._autocast():
            cache = self._new_cache()
            cache.mode = "hold"
            return self.model(inps, past_key_values=cache, use_cache=True).logits

    # ------------------------------------------------------------------------------------ loglikelihood_rolling

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._tasks = {}
        tasks = [r.task_name or "" for r in requests]
        if not self.compression.method.compresses:
            return self._score_windows(requests, tasks, disable_tqdm)
        documents = [self.tok_encode(r.args[0]) for r in requests]
        self._check_documents(documents)
        every = self.compression.schedule.compress_every or self.engine.rolling_compress_every
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        size = 1 if self.batch_size == "auto" else int(self.batch_size)
        answers = [0.0] * len(documents)
        total = sum(map(len, documents))
        bar = tqdm(total=total, unit="tok", disable=disable_tqdm or self.rank != 0, desc="kvcompressed rolling")
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            with self._autocast():
                scored, cache = score_documents(
                    self.model,
                    self._new_cache,
                    self.prefix_token_id,
                    [documents[i] for i in batch],
                    every,
                    self.softmax_dtype,
                    bar.update,
                )
            for i, document in zip(batch, scored, strict=True):
                answers[i] = float(document.log_probs.double().sum())
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, answers[i])
            if cache.seen:
                end = cache.snapshot()
                texts = [requests[i].args[0] for i in batch]
                self.compression_log.add_batch([tasks[i] for i in batch], texts, "loglikelihood_rolling", end, end)
        bar.close()
        return answers

    def _score_windows(self, requests: list[Instance], tasks: list[str], disable_tqdm: bool) -> list[float]:
        """lm-eval's rolling windows, for the same number as its hf model; no rank waits for another."""
        documents = [self.tok_encode(r.args[0]) for r in requests]
        windows = []
        for i, tokens in enumerate(documents):
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(i, (None, *make_disjoint_window(w))) for w in rolling]
        size = 1 if self.batch_size == "auto" else int(self.batch_size)
        answers = [0.0] * len(documents)
        hidden = disable_tqdm or self.rank != 0
        for start in tqdm(range(0, len(windows), size), disable=hidden, desc="kvcompressed rolling windows"):
            batch = windows[start : start + size]
            scores = self._loglikelihood_tokens([w for _, w in batch], disable_tqdm=True, override_bs=len(batch))
            for (i, _), (score, _) in zip(batch, scores, strict=True):
                answers[i] += score
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        texts = [r.args[0] for r in requests]
        self._log_uncached(tasks, texts, "loglikelihood_rolling", list(map(len, documents)))
        return answers

    def _check_documents(self, documents: list[list[int]]) -> None:
        longest = max(map(len, documents), default=0)
        if longest < self.max_length:
            return
        learned = self.facts.rope is not None and not self.facts.rope.available(0)
        if learned and longest > self.max_length:
            raise UserError(
                f"a document of {longest} tokens passes the {self.max_length} positions that this "
                "model has learned, and one "
                "cache carried across it needs them; use method=full (lm-eval's windows) or a rotary model"
            )
        if not self.compression.method.in_cache_sinks:
            log.warning(
                "a document of %d tokens passes the model's maximum of %d: method=%s keeps true "
                "positions, so tokens beyond it "
                "are at distances and positions the model was not trained on (method=streaming_llm does not have this)",
                longest,
                self.max_length,
                self.compression.method.name,
            )

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

    def _log_uncached(self, tasks: list[str], prompts: Sequence[Hashable], kind: str, lengths: list[int]) -> None:
        """Records of requests that held no compressed cache: method=no_cache, and lm-eval's windows
        under method=full."""
        per_token = 0 if not self.compression.method.uses_cache else self._kv_bytes_per_token()
        snapshot = {
            "seen": lengths,
            "kept_fraction": [1.0 if per_token else 0.0] * len(lengths),
            "compressed": [False] * len(lengths),
            "kv_bytes_valid": [min(n, self.max_length) * per_token for n in lengths],
            "kv_bytes_allocated": max((min(n, self.max_length) for n in lengths), default=0) * per_token,
            "overhead_bytes": 0,
            "peak_slots": [min(n, self.max_length) if per_token else 0 for n in lengths],
        }
        self.compression_log.add_batch(tasks, prompts, kind, snapshot, snapshot)

    def _kv_bytes_per_token(self) -> int:
        cfg = self.model.config.get_text_config()
        heads = getattr(cfg, "num_key_value_heads", None) or cfg.num_attention_heads
        size = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        return 2 * self.facts.num_layers * heads * size * self.model.dtype.itemsize

    def barrier(self) -> None:
        """Every rank passes here after each kind of request: rank 0 takes the others' records, which let go of them."""
        if self.world_size > 1:
            gathered = self.gather_object(self.compression_log.records)
            self.compression_log.records = [r for rank in gathered or [] for r in rank]
        super().barrier()

    def get_model_info(self) -> dict[str, Any]:
        """Goes into results["config"]: what was compressed and what was not, with all settings and versions."""
        summary = self.compression_log.summary()
        self._say_what_happened(summary)
        return {
            **super().get_model_info(),
            "kv_compression": self.settings,
            "kv_stats": summary,
            "kv_versions": {"kv-lm-eval": __version__, **{p: version(p) for p in ("transformers", "torch", "lm-eval")}},
        }

    def _say_what_happened(self, summary: dict[str, Any]) -> None:
        """One line for the run, and a warning for each task whose requests were all too short to be compressed."""
        if not summary["requests"]:
            log.warning("all answers came from the request cache: there are no numbers on memory or compression")
            return
        log.info(
            "%s: %.0f %% of %d requests compressed, %.0f %% of pairs kept at their end, %.0f KiB of "
            "keys and values after the "
            "prefill on average",
            self.compression.method.name,
            100 * summary["compressed_share"],
            summary["requests"],
            100 * summary["kept_fraction_mean"],
            summary["kv_bytes_prefill_mean"] / 1024,
        )
        budget = {k: v for k, v in self.compression.settings().items() if k in ("max_capacity_prompt", "keep_ratio")}
        for task, one in summary["by_task"].items():
            if self.compression.method.compresses and one["compressed_share"] == 0:
                lengths = one["prompt_tokens"]
                log.warning(
                    "%s: compression triggered in NONE of %d requests, so its score is the full "
                    "cache's: prompts have %d to %d "
                    "tokens (median %d), the budget is %s. Take longer prompts (more few-shot "
                    "examples) or a smaller budget.",
                    task or "this run",
                    one["requests"],
                    lengths["min"],
                    lengths["max"],
                    lengths["median"],
                    budget,
                )

    def fingerprint(self) -> str:
        """Hash of all that decides an answer: model, revision, dtype, length limit, method, every setting."""
        what = {
            "pretrained": str(self._name),
            "weights": request_cache.weights_identity(self.pretrained, self.model),
            "kv-lm-eval": __version__,
            "revision": str(self.revision),
            "peft": str(self.peft),
            "delta": str(self.delta),
            "dtype": str(self.model.dtype),
            "mixed_precision": str(self.mixed_precision_dtype),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "chat_template_args": self.chat_template_args,
            "think_end_token": self.think_end_token,
            "settings": self.settings,
        }
        return request_cache.digest(what)

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
            for key in [k for k, answer in cache_hook.dbdict.items() if answer == OUT_OF_MEMORY]:
                del cache_hook.dbdict[key]  # tried again, perhaps on a larger device
            cache_hook.add_partial = self._unless_out_of_memory(cache_hook.add_partial)
        super().set_cache_hook(cache_hook)


def every_row(snapshot: dict[str, Any], step: int) -> dict[str, Any]:
    """A snapshot reduced to each step-th row."""
    return {k: v[::step] if isinstance(v, list) else v for k, v in snapshot.items()}


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
