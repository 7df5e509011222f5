"""PerplexityTask: documents scored under a named protocol (`class:` of the YAMLs).

A class, because lm-eval's `loglikelihood_rolling` asks with a text alone, so that neither the protocol nor the number
of tokens could be told to the model, and knows one number per document where several are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import version
from typing import Annotated, Any

import pydantic
from lm_eval.api.task import ConfigurableTask
from packaging.version import Version
from typing_extensions import TypedDict

from kv_lm_eval import files, quiet
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.metrics import perplexity as metrics
from kv_lm_eval.metrics.perplexity import count_words
from kv_lm_eval.requests.document_scores import DocumentScore
from kv_lm_eval.requests.reading import Reading
from kv_lm_eval.tasks.model_length import model_max_length
from kv_lm_eval.tasks.perplexity import texts

READING = ("protocol", "max_eval_tokens", "prefill_tokens", "strided_length", "stride")
AGGREGATIONS: dict[str, tuple[Any, bool | None]] = {  # name: how documents are put together, whether higher is better
    "perplexity": (metrics.perplexity, False),
    "ppl_after_first_eviction": (metrics.perplexity, False),
    "word_perplexity": (metrics.perplexity, False),
    "byte_perplexity": (metrics.perplexity, False),
    "bits_per_byte": (metrics.bits, False),
    "next_token_accuracy": (metrics.ratio, True),
    "scored_tokens": (metrics.total, None),
    "documents": (metrics.total, None),
}
quiet.install()


class Sources(TypedDict, total=False):
    """The keys of --metadata that say where the text is, and their types."""

    text_files: str | list[str] | None
    wikitext_dir: str | None
    pg19_dir: str | None
    books: Annotated[int, pydantic.Field(ge=1)]


SOURCES = tuple(Sources.__annotations__)


class PerplexityTask(ConfigurableTask):
    """One collection of documents.

    Args:
        config: the YAML: lm-eval's keys and the section `perplexity` (`source`, and defaults of READING). Its
            `metadata` holds --model_args and --metadata too.
    """

    aggregations = AGGREGATIONS

    def __init__(self, config: Mapping[str, Any]) -> None:
        if Version(version("lm-eval")) < Version("0.4.12"):
            raise UserError(
                f"the perplexity tasks need lm-eval 0.4.12 or later, this is {version('lm-eval')}: earlier ones tell "
                "a task class neither --model_args nor --metadata"
            )
        config = dict(config)
        section = dict(config.pop("perplexity"))
        config.pop("class", None)
        metadata = config["metadata"] = dict(config.get("metadata") or {})
        self._source = section.pop("source")
        self._dataset = section.pop("dataset", None)
        self._joined = bool(section.pop("joined", False))
        self._given = metadata
        self.reading = _reading(section, metadata)
        files.check({key: metadata[key] for key in SOURCES if key in metadata}, Sources, "--metadata")
        length, limit = self.reading.strided_length, model_max_length(metadata)
        if length is not None and limit is not None and length > limit:
            raise UserError(f"strided_length={length} passes the model's maximum of {limit} tokens")
        self.ours = "method" in metadata or "compression" in metadata
        if "pretrained" in metadata and not self.ours and not self._stock:
            raise UserError(self._other_models(config["task"]))
        metadata["perplexity"] = {
            **self.reading.options(),
            "max_eval_tokens": self.reading.max_eval_tokens,
            "line_ends": texts.LINE_ENDS,
        }
        config.update(
            doc_to_text="",
            doc_to_target="{{text}}",
            process_results=f"{type(self).__module__}.{type(self).__name__}.process_results",  # a word for the records
            metric_list=[
                {"metric": name, "aggregation": how, "higher_is_better": better}
                for name, (how, better) in self.aggregations.items()
            ],
        )
        super().__init__(config=config)

    @property
    def _answers_only(self) -> bool:
        """Whether lm-eval runs with --predict_only, under which it takes this one metric's name and nothing else."""
        return "bypass" in self._metric_fn_list

    @property
    def _stock(self) -> bool:
        """Whether lm-eval's own models answer under this reading too."""
        return self.reading.protocol == "rolling" and self.reading.max_eval_tokens is None

    def _other_models(self, task: str) -> str:
        """What is said of a model that is not ours."""
        return (
            f"{task} under protocol={self.reading.protocol}, max_eval_tokens={self.reading.max_eval_tokens} needs "
            "--model kvcompressed (method=full is the uncompressed cache): any other model would answer with lm-eval's "
            'rolling windows over the whole text. For those: --metadata \'{"protocol": "rolling", "max_eval_tokens": '
            "null}'"
        )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        from datasets import Dataset

        if self._source == "files":
            rows = texts.files(self._given.get("text_files"))
        elif self._source == "wikitext":
            rows = texts.wikitext(self._dataset, self._given.get("wikitext_dir"), self._joined)
        else:
            rows = texts.pg19(self._given.get("pg19_dir"), self._given.get("books", 1))
        self.dataset = {"test": Dataset.from_list(rows)}

    def doc_to_target(self, doc: dict[str, Any], doc_to_target: Any = None) -> str:
        """The text itself: through a template its last line end would be lost."""
        return doc["text"]

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> Any:
        """(text, reading); (text,) where lm-eval's own models are to answer."""
        request = super().construct_requests(doc, ctx, **kwargs)
        if not self._stock or self.ours:
            request.arguments = (doc["text"], self.reading.options())
        return request

    def process_results(self, doc: dict[str, Any], results: list[float]) -> dict[str, Any]:
        """Sums and counts of one document; `doc` gets the per-token numbers, for --log_samples."""
        (score,) = results
        if not isinstance(score, DocumentScore):
            if self._answers_only:
                return {"bypass": 0}
            if not self._stock:
                raise UserError(
                    f"protocol={self.reading.protocol} was asked for and the model answered with a number of its own "
                    "protocol: use --model kvcompressed, or protocol=rolling"
                )
            per_text = {"words": (score, doc["words"]), "bytes": (score, doc["bytes"])}
            return _text_metrics(per_text) | {"documents": 1}
        record = score.record
        if record.reading["protocol"] != self.reading.protocol:
            raise UserError(
                f"protocol={self.reading.protocol} was asked for, {record.reading['protocol']} was run: this method "
                "carries one cache across the document. Use protocol=streaming, or method=full"
            )
        doc["per_token"] = record.per_token()
        return {"bypass": 0} if self._answers_only else self.numbers_of(doc, score)

    def numbers_of(self, doc: dict[str, Any], score: DocumentScore) -> dict[str, Any]:
        """One document's entry for each of `aggregations`."""
        record = score.record
        scored, late = record.scored, record.after_first_eviction()
        log_probs = record.log_probs.astype("float64")
        out: dict[str, Any] = {
            "perplexity": (float(score), int(scored.sum())),
            "ppl_after_first_eviction": (float(log_probs[scored & late].sum()), int((scored & late).sum())),
            "next_token_accuracy": (int(record.greedy[scored].sum()), int(scored.sum())),
            "scored_tokens": int(scored.sum()),
            "documents": 1,
        }
        if not scored.all():
            return out  # no text whose words and bytes are exactly those scored
        words, size = doc["words"], doc["bytes"]
        if record.start or record.end < len(doc["text"]):
            part = doc["text"][record.start : record.end]
            words, size = count_words(part), len(part.encode())
        return out | _text_metrics({"words": (float(score), words), "bytes": (float(score), size)})


def _text_metrics(pairs: Mapping[str, tuple[float, int]]) -> dict[str, Any]:
    return {
        "word_perplexity": pairs["words"],
        "byte_perplexity": pairs["bytes"],
        "bits_per_byte": pairs["bytes"],
    }


def _reading(defaults: Mapping[str, Any], metadata: Mapping[str, Any]) -> Reading:
    """The YAML's defaults, replaced by what --metadata says; a name that only resembles one of ours is an error."""
    known = (*READING, *SOURCES)
    for name in metadata:
        if name not in known and get_close_matches(name, known, cutoff=0.85):
            raise UserError(
                f"unknown setting {name!r} in --metadata{close_names(name, known)}; the perplexity tasks take "
                f"{', '.join(known)}"
            )
    given = {k: _none(metadata[k]) for k in READING if k in metadata}
    return Reading(**{**defaults, **given})


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value
