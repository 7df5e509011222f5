"""LongBenchTask: a dataset as the official pred.py and eval.py run it, as an lm-eval task (`class:` of the YAMLs).

A class, because lm-eval's YAML words have no truncation in the middle before the chat template, no chat template for
some tasks only, and no stop at a token. Everything that decides a score is in the files beside this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from lm_eval.api.task import ConfigurableTask
from packaging.version import Version

from kv_lm_eval import quiet
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries

from . import aggregate, data, metrics
from .scoring import best_score
from .settings import Settings
from .specs import Spec
from .truncation import Fitted, encode, truncate_middle

log = logging.getLogger("lm_eval.tasks.longbench")  # below lm-eval's logger: its format, its verbosity
quiet.install()


def _check_lm_eval(installed: str) -> None:
    if Version(installed) < Version("0.4.12"):
        raise UserError(
            f"the LongBench tasks need lm-eval 0.4.12 or later, this is {installed}: earlier ones tell a task class "
            "neither --model_args nor --metadata, so that it cannot know which tokenizer cuts the prompts"
        )


class LongBenchTask(ConfigurableTask):
    """One LongBench dataset.

    Args:
        config: the YAML: lm-eval's keys, the section `longbench` (specs.py), and `longbench_e: true` for the
            LongBench-E version. Its `metadata` holds --model_args and --metadata too (settings.py).
    """

    RECORD = "longbench"  # of a task's metadata: how it was run

    def __init__(self, config: Mapping[str, Any]) -> None:
        _check_lm_eval(version("lm-eval"))
        config = dict(config)
        name = str(config["task"])
        self.spec = Spec.from_section(config.pop("longbench", None) or {}, name)
        self.is_e = bool(config.pop("longbench_e", False))
        config.pop("class", None)
        metadata = config["metadata"] = dict(config.get("metadata") or {})
        self.settings = self._read_settings(metadata)
        self._scorer = metrics.load(self.spec.metric)
        self._extras = {m: metrics.load(m) for m in self.spec.extra_metrics if self.settings.extra_metrics}
        self._fitted: dict[int, Fitted] = {}
        self._said: set[str] = set()
        config.update(
            doc_to_target="answers",
            process_results=f"{__name__}.LongBenchTask.process_results",  # a word for the records
            generation_kwargs=self._generation_settings(),
            metric_list=self._metric_list(),
        )
        metadata[self.RECORD] = self._record = {
            "dataset": self.spec.dataset,
            "longbench_e": self.is_e,
            "category": self.spec.category,
            "language": self.spec.language,
            "metric": self.spec.metric,
            "protocol": self.settings.protocol.name,
            "max_length": self.settings.max_length,
            "max_length_from": self.settings.max_length_from,
            "chat_template": "none",
        }
        super().__init__(config=config)

    # ------------------------------------------------------------------------------------ set up

    def _read_settings(self, metadata: Mapping[str, Any]) -> Settings:
        return Settings.from_metadata(metadata)

    def _generation_settings(self) -> dict[str, Any]:
        """Greedy, no stop string. The end-of-text tokens are the model's own, but where a newline ends the answer."""
        protocol, tokenizer = self.settings.protocol, self.settings.tokenizer
        settings: dict[str, Any] = {"until": [], "do_sample": False, "max_gen_toks": self.spec.max_gen_toks}
        if protocol.min_new_tokens:
            settings["min_new_tokens"] = protocol.min_new_tokens
        if self.spec.stop_at_newline and protocol.newline_stops:
            if tokenizer is None:
                settings["until"] = ["\n"]  # the nearest that a model class without our tokenizer can do
            else:
                settings["min_new_tokens"] = 1
                newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
                settings["eos_token_id"] = [i for i in (tokenizer.eos_token_id, newline) if i is not None]
        return settings

    def _metric_list(self) -> list[dict[str, Any]]:
        def metric(name: str, aggregation: Any, higher_is_better: bool | None = True) -> dict[str, Any]:
            return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}

        scores = [metric("score", aggregate.percent)]
        if self.is_e:
            scores += [metric(f"score_{b}", f) for b, f in aggregate.bucket_aggregations().items()]
        scores += [metric(f"extra_{name}", aggregate.percent) for name in self._extras]
        return [
            *scores,
            metric("truncated", "mean", None),
            metric("prompt_tokens", "mean", None),
            metric("prompt_tokens_kept", "mean", None),
        ]

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        from datasets import Dataset

        name = self.spec.dataset + ("_e" if self.is_e else "")
        rows, self._record["data"] = data.load_rows(name, self.settings.data_dir, self.spec)
        self.dataset = {"test": Dataset.from_list(rows)}

    # ------------------------------------------------------------------------------------ prompts

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The official prompt, cut, before any chat template."""
        return self._fit(doc, None)

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int = 0,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str:
        """The prompt as the model gets it."""
        template = self._template(chat_template if apply_chat_template else None, system_instruction)
        return self._fit(doc, template)

    def _template(
        self, chat_template: Callable[..., str] | None, system_instruction: str | None
    ) -> Callable[[str], str] | None:
        chat_format = self.settings.chat_format
        if not self.spec.chat_template or not self.settings.protocol.allows_template(self.settings.model):
            if chat_template or chat_format or system_instruction:
                why = "in LongBench" if not self.spec.chat_template else f"for {self.settings.model or 'this model'}"
                self._say(f"no chat template: {self.spec.dataset} has none {why} (protocol {self._record['protocol']})")
            return None
        if chat_format is not None:
            if chat_template is not None:
                raise UserError("longbench_chat_format and --apply_chat_template are both set; give one of them")
            self._record["chat_template"] = chat_format
            return lambda text: chat_format.format(prompt=text)
        if chat_template is None:
            if system_instruction:
                self._say("--system_instruction has no effect on LongBench without --apply_chat_template")
            return None
        self._record["chat_template"] = "the model's"
        system = [{"role": "system", "content": system_instruction}] if system_instruction else []

        def template(text: str) -> str:
            messages = [*system, {"role": "user", "content": text}]
            return self._without_bos(chat_template(messages, add_generation_prompt=True))

        return template

    def _without_bos(self, text: str) -> str:
        """Takes away the BOS of a template where the tokenizer will put one anyway.

        lm-eval looks at the first text of a batch to see whether all have one, and here templated and other prompts
        may meet in one batch.
        """
        tokenizer = self.settings.tokenizer
        bos = getattr(tokenizer, "bos_token", None)
        if not bos or not text.startswith(bos) or encode("a", tokenizer)[:1] != [tokenizer.bos_token_id]:
            return text
        return text[len(bos) :]

    def _fit(self, doc: dict[str, Any], template: Callable[[str], str] | None) -> str:
        settings = self.settings
        prompt = self._prompt(doc)
        wrap = settings.protocol.wrap(settings.model)
        if wrap is not None:
            prompt = wrap.format(prompt=prompt)
            self._record["chat_template"] = wrap
        if settings.tokenizer is None or settings.max_length is None:
            return template(prompt) if template else prompt
        length = settings.max_length
        while True:
            fitted = self._truncate(prompt, length)
            text = template(fitted.text) if template else fitted.text
            over = self._tokens_over(text) if settings.shrinks else 0
            if over <= 0:
                break
            length = min(length, fitted.tokens_before) - over
            if length < 2:
                limit = settings.model_max_length
                raise UserError(f"{self.spec.dataset}: template and answer alone take the model's {limit} tokens")
        self._fitted[doc["row"]] = fitted
        return text

    def _prompt(self, doc: Mapping[str, Any]) -> str:
        return self.spec.prompt.format(**doc)

    def _from_question(self, doc: Mapping[str, Any]) -> str:
        """The uncut prompt's text from the question on; empty where a row asks none."""
        return self.spec.from_question(doc)

    def _truncate(self, prompt: str, length: int) -> Fitted:
        return truncate_middle(prompt, self.settings.tokenizer, length)

    def _tokens_over(self, text: str) -> int:
        assert self.settings.model_max_length is not None
        room = self.settings.model_max_length - int(self.config.generation_kwargs["max_gen_toks"])
        return len(encode(text, self.settings.tokenizer)) - room

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message)

    # ------------------------------------------------------------------------------------ requests and results

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Any:
        """As lm-eval's; kvcompressed is told where the question begins, and that an answer ends at an end token, never
        at text that spells one."""
        told: dict[str, Any] = {"eos_text_is_no_stop": True}
        tail = self._from_question(doc)
        if tail and (begins := ctx.rfind(tail)) >= 0:
            told[boundaries.BEGINS] = begins
        return super().construct_requests({**doc, **told}, ctx, **kwargs)

    def build_all_requests(self, *, cache_requests: bool = False, **kwargs: Any) -> None:
        """As lm-eval's, without its request cache, which would mix up data folders, lengths and protocols."""
        if cache_requests:
            self._say("--cache_requests is not used for LongBench: its key knows neither data, length nor protocol")
            kwargs["rewrite_requests_cache"] = False
        super().build_all_requests(cache_requests=False, **kwargs)

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        """Scores one raw answer: nothing is stripped."""
        if "bypass" in self._metric_fn_list:  # --predict_only
            return {"bypass": 0}
        return {**self.scored(str(results[0]), doc), **self._counts(doc)}

    def scored(self, answer: str, doc: Mapping[str, Any]) -> dict[str, Any]:
        """An answer's numbers, by metric."""

        def best(scorer: metrics.Scorer) -> float:
            return best_score(scorer, answer, doc["answers"], doc["all_classes"], self.spec.first_line_only)

        score = best(self._scorer)
        buckets = {f"score_{bucket}": (score, doc["length"]) for bucket in aggregate.BUCKETS if self.is_e}
        return {"score": score, **buckets, **{f"extra_{name}": best(scorer) for name, scorer in self._extras.items()}}

    def _counts(self, doc: Mapping[str, Any]) -> dict[str, int]:
        """A prompt's tokens; none where it was not cut by us."""
        fitted = self._fitted.get(doc["row"])
        if fitted is None:
            return {}
        return {
            "truncated": int(fitted.truncated),
            "prompt_tokens": fitted.tokens_before,
            "prompt_tokens_kept": fitted.tokens_after,
        }
