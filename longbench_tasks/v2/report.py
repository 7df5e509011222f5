"""LongBench v2's official line of an lm-eval run: overall, easy, hard, short, medium, long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {"score": "Overall", "easy": "Easy", "hard": "Hard", "short": "Short", "medium": "Medium", "long": "Long"}


def page(results: Mapping[str, Any]) -> str:
    """What is printed, rounded as the official script rounds; "" where no such task was run."""
    lines = []
    for task, config in results.get("configs", {}).items():
        run = config["metadata"].get("longbench2") if isinstance(config.get("metadata"), dict) else None
        values = results.get("results", {}).get(task, {})
        if not isinstance(run, dict) or "score,none" not in values:
            continue
        numbers = {name: values.get(f"{column},none") for column, name in COLUMNS.items()}
        found = {n: v for n, v in numbers.items() if isinstance(v, (int, float)) and v == v}
        lines.append(f"  {task:<26}" + "".join(f"{name} {value:.1f}   " for name, value in found.items()).rstrip())
        if empty := values.get("empty,none"):
            lines.append(f"    {empty:.1%} of the answers are empty and not counted, as officially")
        counts = results.get("n-samples", {}).get(task, {})
        if counts and counts.get("effective") != counts.get("original"):
            lines.append("    Not all questions were asked: not to be compared with published numbers.")
    return "\n".join(["", "LongBench v2, official scores", *lines]) if lines else ""
