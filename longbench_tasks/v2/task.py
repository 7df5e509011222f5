"""LongBench2Task: LongBench v2 as the official pred.py asks it and result.py scores it.

Reference: THUDM/LongBench@c5ea10b, pred.py and prompts/. Deviations: greedy (there: temperature 0.1, so that two runs
differ); an answer that is empty is not counted, as there, where it means a failed call.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..benchmark import BenchmarkTask
from ..settings import Settings
from ..truncation import Fitted, encode
from . import data, scoring

MOST_TOKENS = 120_000  # of a prompt: what the official script leaves of open models with 128k positions
FIELDS = {  # in this order, as officially: a marker inside a text is replaced too
    "$DOC$": "context",
    "$Q$": "question",
    "$C_A$": "choice_A",
    "$C_B$": "choice_B",
    "$C_C$": "choice_C",
    "$C_D$": "choice_D",
    "$COT$": "cot",
}


class LongBench2Task(BenchmarkTask):
    """LongBench v2.

    Args:
        config: as of LongBenchTask; `asks_from` has the words of the prompt at which its question begins.
    """

    RECORD = "longbench2"
    NAME = "LongBench v2"
    KEYS = ("longbench2_dir", "longbench2_cot")

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        self._asks_from = str(config.pop("asks_from"))
        super().__init__(config)

    def most_tokens(self, settings: Settings) -> int:
        return min(settings.max_length or MOST_TOKENS, MOST_TOKENS)

    def _metric_list(self) -> list[dict[str, Any]]:
        names = [name for kind in scoring.BUCKETS.values() for name in kind]
        return [
            {"metric": "score", "aggregation": "mean", "higher_is_better": True},
            *(
                {"metric": name, "aggregation": partial(scoring.of_bucket, name), "higher_is_better": True}
                for name in names
            ),
            *(
                {"metric": name, "aggregation": "mean", "higher_is_better": None}
                for name in ("no_choice", "empty", "truncated", "prompt_tokens", "prompt_tokens_kept")
            ),
        ]

    def rows(self) -> tuple[list[dict[str, Any]], str]:
        rows, source = data.load_rows(self.where["longbench2_dir"])
        if "$COT$" in self.spec.prompt:
            rows = data.with_reasoning(rows, self.where["longbench2_cot"])
            source += f", reasoning of {self.where['longbench2_cot']}"
        return [{**row, "answers": [row["answer"]]} for row in rows], source

    # ------------------------------------------------------------------------------------ prompts

    def _prompt(self, doc: Mapping[str, Any], prompt: str | None = None) -> str:
        prompt = self.spec.prompt if prompt is None else prompt
        for marker, field in FIELDS.items():
            if field in doc:
                prompt = prompt.replace(marker, str(doc[field]).strip())
        return prompt

    def _from_question(self, doc: Mapping[str, Any]) -> str:
        template = self.spec.prompt
        return self._prompt(doc, template[template.rindex(self._asks_from) :]).strip()

    def _truncate(self, prompt: str, length: int) -> Fitted:
        """Both halves decoded as one; of an odd length the second one is a token longer."""
        tokenizer = self.settings.tokenizer
        ids = encode(prompt, tokenizer)
        if len(ids) <= length:
            return Fitted(prompt, False, len(ids), len(ids))
        text = tokenizer.decode(ids[: length // 2] + ids[-length // 2 :], skip_special_tokens=True)
        return Fitted(text, True, len(ids), len(encode(text, tokenizer)))

    # ------------------------------------------------------------------------------------ results

    def scored(self, answer: str, doc: Mapping[str, Any]) -> dict[str, Any]:
        """The score of one answer, from 0 to 100; an empty answer has none."""
        if not answer.strip():
            return {"empty": 1}
        right = scoring.score(answer, doc["answer"])
        buckets = tuple(scoring.bucket_of(doc, kind) for kind in scoring.BUCKETS)
        by_bucket = {name: (right, buckets) for kind in scoring.BUCKETS.values() for name in kind}
        no_choice = int(scoring.choice(answer) is None)
        return {"score": 100 * right, **by_bucket, "no_choice": no_choice, "empty": 0}
