"""BenchmarkTask: a benchmark of long contexts beside LongBench, asked by one template and scored by its own scorer.

What is the same in all of them is LongBenchTask's: prompts by template, the cut, chat templates, greedy answers that
are scored as they came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from kv_lm_eval.errors import UserError, close_names

from .settings import Settings
from .task import LongBenchTask


class Rows(list[dict[str, Any]]):
    """Documents as lm-eval takes them. Not datasets', which would copy a text for each question that is asked of it."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.features = dict.fromkeys(rows[0] if rows else ())  # lm-eval asks for their names


class BenchmarkTask(LongBenchTask):
    """A task of another benchmark, whose keys of --metadata begin with RECORD.

    Args:
        config: as of LongBenchTask; in a prompt the context comes first, and what follows it is the question.
    """

    NAME: ClassVar[str]  # in words
    KEYS: ClassVar[tuple[str, ...]]  # of --metadata

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        metadata = dict(config.get("metadata") or {})
        for key in metadata:
            if key.startswith(f"{self.RECORD}_") and key not in self.KEYS:
                raise UserError(
                    f"unknown key {key!r} in --metadata{close_names(key, self.KEYS)}; {self.NAME}'s are {self.KEYS}"
                )
        self.where = {key: metadata.get(key) for key in self.KEYS}
        super().__init__(config)

    def rows(self) -> tuple[list[dict[str, Any]], str]:
        """Documents, each with its `answers`, and where they come from."""
        raise NotImplementedError

    def most_tokens(self, settings: Settings) -> int:
        """Tokens of a prompt that are kept where nobody asked for a number: what the model takes."""
        assert settings.model_max_length is not None
        return settings.model_max_length

    def _read_settings(self, metadata: Mapping[str, Any]) -> Settings:
        settings = super()._read_settings(metadata)
        if settings.shrinks and settings.model_max_length is not None:
            return replace(settings, max_length=self.most_tokens(settings))
        return settings

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        rows, self._record["data"] = self.rows()
        self.dataset = {"test": Rows([{"all_classes": None, **row, "row": n} for n, row in enumerate(rows)])}

    def _from_question(self, doc: Mapping[str, Any]) -> str:
        return self.spec.prompt.rpartition("{context}")[2].format(**doc).strip()
