"""LoogleTask: a task of LooGLE as the official scripts ask it of open models and score it.

Reference: bigai-nlco/LooGLE, config/task2prompt.json, config/task2maxlen.json, Prediction/pred_opensource_models.py.
Deviations: no repetition penalty (there 2.0: --gen_kwargs repetition_penalty=2.0). The order of events that some
questions of longdep_qa ask for is scored as their other answers are (there also by Reorder/, from answers of GPT-4).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from .. import metrics
from ..benchmark import BenchmarkTask
from . import data


class LoogleTask(BenchmarkTask):
    """A task of LooGLE."""

    RECORD = "loogle"
    NAME = "LooGLE"
    KEYS = ("loogle_dir",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        metric = dict(config)["longbench"]["metric"]
        self._scores: Any = importlib.import_module(metrics.load(metric).__module__)
        super().__init__(config)

    def rows(self) -> tuple[list[dict[str, Any]], str]:
        return data.load_rows(self.spec, self.where["loogle_dir"])

    def _metric_list(self) -> list[dict[str, Any]]:
        of_prompts = [metric for metric in super()._metric_list() if metric["higher_is_better"] is None]
        return [
            *(
                {"metric": name, "aggregation": self._scores.percent, "higher_is_better": True}
                for name in self._scores.NAMES
            ),
            *of_prompts,
        ]

    def scored(self, answer: str, doc: Mapping[str, Any]) -> dict[str, Any]:
        return self._scores.score(answer, doc["answers"][0])
