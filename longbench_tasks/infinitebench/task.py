"""InfiniteBenchTask: a task of InfiniteBench as the official scripts ask it of open models and score it.

Reference: OpenBMB/InfiniteBench, src/prompt.py (the templates for YaRN-Mistral, the open model there),
src/eval_utils.py create_prompt and get_answer, src/eval_yarn_mistral.py truncate_by_tokens.
Deviations: a prompt leaves room for its answer within the model's positions (there an answer goes beyond them).
"""

from __future__ import annotations

from typing import Any

from ..benchmark import BenchmarkTask
from ..settings import Settings
from ..truncation import Fitted, encode
from . import data

MOST_TOKENS = 128 * 1024  # of a prompt


class InfiniteBenchTask(BenchmarkTask):
    """A task of InfiniteBench."""

    RECORD = "infinitebench"
    NAME = "InfiniteBench"
    KEYS = ("infinitebench_dir",)

    def rows(self) -> tuple[list[dict[str, Any]], str]:
        return data.load_rows(self.spec, self.where["infinitebench_dir"])

    def most_tokens(self, settings: Settings) -> int:
        return min(super().most_tokens(settings), MOST_TOKENS)

    def _truncate(self, prompt: str, length: int) -> Fitted:
        """Both halves decoded as one, of an odd length without its last token."""
        tokenizer = self.settings.tokenizer
        ids = encode(prompt, tokenizer)
        if len(ids) <= length:
            return Fitted(prompt, False, len(ids), len(ids))
        half = length // 2
        text = tokenizer.decode(ids[:half] + ids[-half:], skip_special_tokens=True)
        return Fitted(text, True, len(ids), len(encode(text, tokenizer)))
