"""Presets for long answers: a budget in tokens, cut on the way; and the length of answers, which is a result too."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import pytest

from kv_lm_eval import config, harness, presets
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.budget import Slots
from kv_lm_eval.metrics.compression import CompressionLog, RequestRecord
from kv_lm_eval.metrics.latency import Timing
from kv_lm_eval.requests import remarks

pytestmark = pytest.mark.filterwarnings("ignore")
PRESETS = [name for name in presets.available() if name.startswith("long_answers/")]
GSM8K = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot-zeroshot.yaml"
TASK = f"""
include: {GSM8K}
task: gsm8k_file
dataset_path: json
dataset_name: null
training_split: null
fewshot_split: null
dataset_kwargs: {{data_files: {{test: DATA}}}}
"""


def test_every_preset_bounds_the_cache_in_tokens_and_cuts_on_the_way():
    assert "long_answers/full" in PRESETS and len(PRESETS) > 5
    for name in set(PRESETS) - {"long_answers/full"}:
        compression, _, rest = config.parse({"preset": name})
        assert not rest and presets.load(name)["about"]
        assert compression.budget == Slots(1024) and compression.schedule.compress_every == 128
        assert config.parse({"preset": name, "max_capacity_prompt": 64})[0].budget == Slots(64)


@pytest.mark.parametrize("ratio", [{"keep_ratio": 0.1}, {"compression_ratio": 0.9}])
def test_a_ratio_beside_them_is_refused(ratio):
    with pytest.raises(UserError, match="needs one budget, got"):
        config.parse({"preset": "long_answers/snapkv", **ratio})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """lm-eval's own GSM8K over a file, as docs/long_answers.md says."""
    where = tmp_path_factory.mktemp("gsm8k")
    rows = [{"question": f"Tom has {i} apples and eats {i - 1}. How many?", "answer": f"1\n#### {1}"} for i in (3, 4)]
    data = where / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (where / "gsm8k_file.yaml").write_text(TASK.replace("DATA", str(data)), encoding="utf-8")
    return where


@pytest.mark.parametrize("name", ["snapkv", "streaming_llm"])
def test_a_preset_runs_lm_evals_own_task_and_reports_lengths(name, folder, caplog, monkeypatch):
    monkeypatch.setattr(remarks, "LONG_ANSWER", 100)  # so that the run may be short
    args = {"pretrained": "kv-tiny", "preset": f"long_answers/{name}", "max_capacity_prompt": 48, "compress_every": 32}
    options = {"include_path": str(folder), "log_samples": True, "gen_kwargs": {"max_gen_toks": 120, "until": []}}
    with caplog.at_level(logging.INFO):
        run = harness.run("kvcompressed", args, ["gsm8k_file"], **options)
    stats = run.results["config"]["kv_stats"]["by_task"]["gsm8k_file"]
    samples = [sample for sample in run.results["samples"]["gsm8k_file"] if sample["filter"] == "strict-match"]
    lengths, prompts = ([one["efficiency"][0][key] for one in samples] for key in ("new_tokens", "prompt_tokens"))
    told = {key: stats["answer_tokens"][key] for key in ("min", "max", "longest")}
    assert told == {"min": min(lengths), "max": max(lengths), "longest": lengths.count(max(lengths))}
    assert stats["answer_tokens_mean"] == sum(lengths) / len(lengths)
    assert max(lengths) == 120 and stats["peak_slots"] <= max(48 + 32, *prompts) and stats["compressed_share"] == 1
    ended = [p + n - 1 for p, n in zip(prompts, lengths, strict=True)]  # the last token is not fed
    for sample, tokens in zip(samples, ended, strict=True):
        assert 48 <= sample["efficiency"][0]["kept_fraction"] * tokens <= 48 + 32 + 1e-6
    assert f"answers of {stats['answer_tokens_mean']:.0f} tokens on average" in caplog.text


def record(i: int, tokens: int | None) -> RequestRecord:
    sizes = dict.fromkeys(("kv_bytes_prefill", "kv_bytes_decode", "kv_bytes_allocated", "overhead_bytes"), 0.0)
    timing = Timing(1, False, 1.0, 0.0, None, None, new_tokens=tokens)
    return RequestRecord("t", "generate_until", 10, True, 0.5, peak_slots=5, doc_id=i, timing=timing, **sizes)


def test_answers_that_a_limit_has_ended_are_told_by_their_common_length():
    log = CompressionLog()
    log.add_batch([record(i, tokens) for i, tokens in enumerate((200, 300, 300, 150))])
    stats = log.summary()["by_task"]["t"]
    assert stats["answer_tokens"] == {"min": 150, "median": 250, "max": 300, "longest": 2}
    assert stats["answer_tokens_mean"] == 237.5
    said = remarks.answer_lengths(stats)
    assert "answers of 238 tokens on average, 150 to 300 (median 250)" in said and "2 of 4 have all 300" in said
    alone = {**stats, "answer_tokens": {**stats["answer_tokens"], "longest": 1}}
    assert "limit" not in remarks.answer_lengths(alone)


def test_choices_have_no_answer_length():
    log = CompressionLog()
    log.add_batch([replace(record(0, None), kind="loglikelihood")])
    assert "answer_tokens" not in log.summary() and "answer_tokens_mean" not in log.summary()["by_task"]["t"]
