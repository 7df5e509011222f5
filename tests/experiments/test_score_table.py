"""Scores of several sweeps beside one point's: means, differences and intervals that are written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import score_table


def sweep(folder: Path, task: str, points: dict[str, list[float]], **more: Any) -> Path:
    """A sweep's folder as far as it is read."""
    for name, scores in points.items():
        at = folder / "points" / name
        at.mkdir(parents=True)
        file = f"model/samples_{task}_2026-01-01T00-00-00.000000.jsonl"
        (at / "model").mkdir()
        rows = [{"doc_id": i, "prompt_hash": "h", "metrics": ["score"], "score": s} for i, s in enumerate(scores)]
        (at / file).write_text("\n".join(json.dumps({**row, **more}) for row in rows))
        (at / "point.json").write_text(json.dumps({"name": name, "status": "done", "files": [file]}))
    (folder / "plan.json").write_text("{}")
    return folder


def test_tasks_weigh_alike_and_are_strata(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    one, two = ({n: draw.random(size).tolist() for n in ("full", "cut")} for size in (20, 7))
    folders = [sweep(tmp_path / "a", "t_one", one), sweep(tmp_path / "b", "t_two", two)]
    points = score_table.read(folders, "score")
    full, cut = score_table.rows(points, "full", ["full", "cut"])
    assert full["t_one"] == pytest.approx(100 * np.mean(one["full"])) and full["difference"] is None
    apart = [100 * (np.array(t["cut"]) - np.array(t["full"])) for t in (one, two)]
    assert cut["mean"] - full["mean"] == pytest.approx(cut["difference"])
    assert cut["difference"] == pytest.approx((apart[0].mean() + apart[1].mean()) / 2)
    parts = [a.var(ddof=1) / len(a) / 4 for a in apart]
    freedom = sum(parts) ** 2 / sum(v**2 / (len(a) - 1) for v, a in zip(parts, apart, strict=True))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    assert cut["high"] - cut["difference"] == pytest.approx(half, rel=0.02)
    assert cut["prompts"] == 27 and cut["changed"] == 27
    said = score_table.markdown([full, cut], "full").splitlines()
    assert said[0] == "| | t_one | t_two | mean | against full | 95 % |" and len(said) == 4
    score_table.draw([full, cut], "full", "", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_only_prompts_that_both_were_asked_count(tmp_path: Path) -> None:
    points = score_table.read([sweep(tmp_path, "t", {"full": [0.0, 1.0, 1.0], "cut": [1.0, 1.0]})], "score")
    _, cut = score_table.rows(points, "full", ["full", "cut"])
    assert cut["prompts"] == 2 and cut["difference"] == pytest.approx(50)


@pytest.mark.parametrize(
    "metric, scores, words",
    [("f1", [0.5], "no 'f1'.*score"), ("score", [40.0], "no share of one"), ("score", [], "no prompt")],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, metric: str, scores: list[float], words: str) -> None:
    folder = sweep(tmp_path, "t", {"full": [1.0], "cut": scores} if not scores else {"full": scores})
    with pytest.raises(UserError, match=words):
        score_table.rows(score_table.read([folder], metric), "full", ["full", "cut"])


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plan.json"):
        score_table.read([tmp_path], "score")
