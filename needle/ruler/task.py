"""RulerTask: one of RULER's 13 tasks as an lm-eval task (`class:` of the YAMLs).

A class, because lm-eval's YAML words have no prompt whose parts are tokenised apart, and because prompts are written
only as far as a run asks for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from lm_eval.api.task import ConfigurableTask

from kv_lm_eval import quiet
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries

from . import data, protocol, settings, split

log = logging.getLogger("lm_eval.tasks.ruler")  # below lm-eval's logger: its format, its verbosity
TASK_PREFIX = "kv_ruler_"
quiet.install()


class Documents(Sequence[dict[str, Any]]):
    """A task's documents, each written when it is first asked for."""

    def __init__(self, number: int, documents: Iterator[dict[str, Any]], fields: Sequence[str]) -> None:
        self._number, self._to_come = number, documents
        self._there: list[dict[str, Any]] = []
        self.features = dict.fromkeys(fields)  # lm-eval asks for their names

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(self._number))]
        if not -self._number <= i < self._number:
            raise IndexError(i)
        while len(self._there) <= i % self._number:
            self._there.append(next(self._to_come))
        return self._there[i % self._number]


class RulerTask(ConfigurableTask):
    """One RULER task.

    Args:
        config: the YAML: lm-eval's keys, and the section `ruler`: `kind` and what its maker takes (generate.py). Its
            `metadata` holds --model_args and --metadata too (settings.py).

    Attributes:
        lacking: why the task cannot be run here, empty where it can; a group goes on without it.
    """

    lacking: str = ""

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        self.recipe = dict(config.pop("ruler", None) or {})
        self.ruler_name = str(config["task"]).removeprefix(TASK_PREFIX)
        config.pop("class", None)
        metadata = config["metadata"] = dict(config.get("metadata") or {})
        self.asking = settings.read(metadata)
        asked = self.asking.settings
        lengths = asked.lengths if len(asked.lengths) > 1 else ()
        config.update(
            doc_to_target="answer",
            process_results=f"{__name__}.RulerTask.process_results",  # a word for the records
            generation_kwargs={
                "until": [],
                "do_sample": False,
                "max_gen_toks": split.MAX_NEW_TOKENS[split.kind(self.ruler_name)],
            },
            metric_list=[
                {"metric": "string_match", "aggregation": "mean", "higher_is_better": True},
                *(
                    {"metric": f"string_match_{n}", "aggregation": partial(of_length, n), "higher_is_better": True}
                    for n in lengths
                ),
            ],
        )
        metadata["ruler"] = {
            "task": self.ruler_name,
            "protocol": asked.protocol,
            "lengths": list(asked.lengths),
            "compress_questions": asked.compress_questions,
            "data": asked.ruler_dir
            or f"generated, seed {asked.ruler_seed}, {asked.ruler_samples} a length, {asked.ruler_words} words",
        }
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        try:
            data.check(self.ruler_name, self.recipe, self.asking)
            number, rows = data.number_of_rows(self.ruler_name, self.recipe, self.asking), self._rows()
        except data.Lacking as error:
            self.lacking = str(error)
            number, rows = 1, iter([self._document(0, 0, split.Row(**{k: "" for k in split.Row.__annotations__}))])  # type: ignore[typeddict-item]
        fields = (*split.Row.__annotations__, "length", "row", "progress_label")
        self.dataset = {"test": Documents(number, rows, fields)}

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number, (length, row) in enumerate(data.rows(self.ruler_name, self.recipe, self.asking)):
            yield self._document(number, length, row)

    def _document(self, number: int, length: int, row: split.Row) -> dict[str, Any]:
        return {**row, "length": length, "row": number, "progress_label": f"{self.ruler_name} {length} tokens"}

    def fewshot_docs(self) -> None:
        """None: the examples are part of the prompts."""

    # ------------------------------------------------------------------------------------ prompts

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The official prompt, beginning of the answer included."""
        return split.whole(doc)

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
        return "".join(self.parts(doc, chat_template if apply_chat_template else None, system_instruction))

    def parts(
        self, doc: Mapping[str, Any], chat_template: Callable[..., str] | None = None, system: str | None = None
    ) -> tuple[str, str]:
        """A prompt before its question, and from it on."""
        asked = self.asking.settings
        if asked.protocol == "kvpress":
            if system:
                raise UserError("--system_instruction: protocol=kvpress has none; leave one of them out")
            return protocol.parts(doc, self.asking.counter.tokenizer, asked.compress_questions)
        if chat_template is None:
            return doc["context"], doc["question"] + doc["answer_prefix"]
        question = doc["question"].rstrip()
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": doc["context"] + question})
        text = chat_template(messages, add_generation_prompt=True) + doc["answer_prefix"].strip()
        begins = text.rindex(question)
        return text[:begins], text[begins:]

    def build_all_requests(self, *, cache_requests: bool = False, **kwargs: Any) -> None:
        """As lm-eval's, without its request cache, which knows neither data, lengths nor protocols."""
        if self.lacking:
            raise UserError(f"{self.config.task} {self.lacking}")
        kwargs["rewrite_requests_cache"] = False
        super().build_all_requests(cache_requests=False, **kwargs)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Any:
        """As lm-eval's; kvcompressed is told where the question begins, and that an end is a token, not its text."""
        template = kwargs.get("chat_template") if kwargs.get("apply_chat_template") else None
        begins = len(ctx) - len(self.parts(doc, template)[1])
        told = {
            boundaries.BEGINS: begins,
            boundaries.APART: self.asking.settings.protocol == "kvpress",
            "eos_text_is_no_stop": True,
        }
        return super().construct_requests({**doc, **told}, ctx, **kwargs)

    # ------------------------------------------------------------------------------------ results

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        """The score of one answer, from 0 to 100."""
        if "bypass" in self._metric_fn_list:  # --predict_only
            return {"bypass": 0}
        line_break = "" if self.asking.settings.protocol == "kvpress" else "\n"
        score = 100 * protocol.score(self.ruler_name, str(results[0]), doc["answer"], line_break)
        lengths = self.asking.settings.lengths
        by_length = {f"string_match_{n}": (score, doc["length"]) for n in lengths if len(lengths) > 1}
        return {"string_match": score, **by_length}


def of_length(length: int, scored: Iterable[tuple[float, int]]) -> float:
    """Aggregation: the mean of the documents of a length, NaN where there is none."""
    own = [score for score, n in scored if n == length]
    return fmean(own) if own else float("nan")
