"""Averages as the leaderboard and the papers make them."""

import json
import math

import pytest
from longbench.golden import OFFICIAL, needs_official, read_jsonl

from kv_lm_eval.tasks.longbench_tasks import aggregate, predictions
from kv_lm_eval.tasks.longbench_tasks.specs import official, official_e

# LongBench README, Llama2-7B-chat-4k
ORDER = (
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader gov_report qmsum multi_news "
    "vcsum trec triviaqa samsum lsht passage_count passage_retrieval_en passage_retrieval_zh lcc repobench-p"
).split()
LLAMA2 = "18.7 19.2 36.8 11.9 25.4 32.8 9.4 5.2 27.3 20.8 25.8 0.2 61.5 77.8 40.7 19.8 2.1 9.8 0.5 52.4 43.8".split()
SCORES = dict(zip(ORDER, map(float, LLAMA2), strict=True))
# SnapKV, Mistral-7B-Instruct-v0.2, All KV
SNAPKV = "26.82 33.06 49.28 42.77 27.33 19.27 32.85 24.25 27.06 71.0 86.23 42.98 2.75 86.98 55.51 52.88".split()


def test_averages_are_the_leaderboards():
    result = aggregate.averages(SCORES, official())
    assert round(result["en"]["average"], 1) == 31.0
    assert round(result["zh"]["average"], 1) == 14.3
    assert result["en"]["categories"]["code"] == result["zh"]["categories"]["code"] == 48.1
    assert result["missing"] == {}


def test_the_mean_of_16_is_the_papers():
    names = [n for n in ORDER if official()[n].language != "zh"]
    result = aggregate.averages(dict(zip(names, map(float, SNAPKV), strict=True)), official())
    assert result["mean16"] == 42.56
    assert "average" not in result["zh"]


def test_an_average_without_all_its_datasets_is_absent():
    result = aggregate.averages({n: s for n, s in SCORES.items() if n != "qasper"}, official())
    assert "average" not in result["en"] and "mean16" not in result
    assert "single_doc_qa" not in result["en"]["categories"]
    assert result["missing"] == {"en": ["qasper"], "mean16": ["qasper"]}
    assert round(result["zh"]["average"], 1) == 14.3


def test_buckets_end_below_4000_and_8000_and_empty_ones_are_absent():
    assert [aggregate.bucket_of(n) for n in (3999, 4000, 7999, 8000)] == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert aggregate.by_length([(0.5, 100), (0.0, 200), (1.0, 9000)]) == {"0-4k": 25.0, "8k+": 100.0}
    assert math.isnan(aggregate.bucket_aggregations()["4-8k"]([(0.5, 100)]))


@needs_official
@pytest.mark.parametrize("key, wanted", [("v1", "golden"), ("v1_contained", "contained")])
def test_official_results_are_equal(key, wanted):
    expected = json.loads((OFFICIAL / "golden_result.json").read_text())[key]
    found = {}
    for file in OFFICIAL.glob("golden/*.jsonl"):
        rows = [row for row in read_jsonl(file) if row["aggregate"] == wanted]
        if rows:
            found[file.stem] = predictions.dataset_score(official()[file.stem], rows)
    assert found == expected


@needs_official
def test_official_results_by_length_are_equal():
    expected = json.loads((OFFICIAL / "golden_result_e.json").read_text())
    found = {}
    for name in official_e():
        rows = [row for row in read_jsonl(OFFICIAL / "golden" / f"{name}.jsonl") if row["aggregate"] == "golden"]
        found[name] = predictions.dataset_score_e(official()[name], rows)
    assert found == expected
