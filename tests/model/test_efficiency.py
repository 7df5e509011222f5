"""Times and memory of every request: measured once a batch, aggregated with the number behind them, never invented."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import tiny as tiny_models
import torch
from lm_eval.api.model import CachingLM
from model.test_commands import run
from model.test_requests import STORY, choices, generations, load, request

from kv_lm_eval.engine.generate import noting_first_token
from kv_lm_eval.metrics import latency
from kv_lm_eval.metrics.latency import Stopwatch, Timing
from kv_lm_eval.metrics.memory import PeakMemory
from kv_lm_eval.requests import remarks

pytestmark = pytest.mark.filterwarnings("ignore")
SNAPKV = {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8}
CPU = torch.device("cpu")


@pytest.mark.parametrize("settings", [SNAPKV, {"method": "full"}, {"method": "no_cache"}], ids=lambda s: s["method"])
def test_every_generation_has_its_times_and_the_first_batch_is_left_out(settings, caplog):
    lm = load("kvcompressed", batch_size=1, **settings)
    caplog.set_level("INFO")
    start = time.perf_counter()
    lm.generate_until(generations(), disable_tqdm=True)
    passed = time.perf_counter() - start
    timings = [r.timing for r in lm.compression_log.records]
    assert [t.warm_up for t in timings] == [True, False, False]
    assert sum(t.total_s for t in timings) < passed
    for t in timings:
        assert 0 < t.ttft_s < t.total_s and t.batch_size == 1 and 1 < t.new_tokens <= 8
        assert t.ttft_s + t.tpot_s * (t.new_tokens - 1) == pytest.approx(t.total_s)
        assert t.tokens_per_s == pytest.approx(t.new_tokens / t.total_s)
        assert t.decode_tokens_per_s == pytest.approx(1 / t.tpot_s)
        assert (t.compression_s > 0) is (settings["method"] == "snapkv") and t.compression_s < t.ttft_s
        assert t.prefill_peak_bytes is t.decode_peak_bytes is None, "not known on a CPU"
    stats = lm.get_model_info()["kv_stats"]
    for summary in (stats["efficiency"], stats["by_task"]["t"]["efficiency"]):
        assert summary["requests"] == 2 and summary["warm_up_requests"] == 1
        assert summary["ttft_s"]["n"] == 2
        assert summary["ttft_s"]["median"] == pytest.approx(sum(t.ttft_s for t in timings[1:]) / 2)
        assert summary["prefill_peak_bytes"] == {"median": None, "p10": None, "p90": None, "n": 0}
    assert "median time to first token" in caplog.text and "(n=2)" in caplog.text
    assert "prefill peak above the weights N/A" in caplog.text and "1 warm-up requests left out" in caplog.text


def test_rows_of_a_batch_share_its_times_and_count_their_own_tokens():
    lm = load("kvcompressed", batch_size=3, **SNAPKV)
    stop = {"until": ["48"], "max_gen_toks": 8}
    lm.generate_until([request("generate_until", STORY * n + "The number is", stop) for n in (1, 2, 3)], True)
    one, two, three = (r.timing for r in lm.compression_log.records)
    assert one.batch_size == 3 and one.ttft_s == two.ttft_s == three.ttft_s
    assert one.tokens_per_s == pytest.approx(sum(t.new_tokens for t in (one, two, three)) / one.total_s)
    assert lm.get_model_info()["kv_stats"]["efficiency"]["ttft_s"]["n"] == 0, "one batch, the warm-up"


def test_choices_have_a_total_but_no_first_token():
    lm = load("kvcompressed", batch_size=2, **SNAPKV)
    lm.loglikelihood(choices(), disable_tqdm=True)
    efficiency = lm.get_model_info()["kv_stats"]["efficiency"]
    assert efficiency["requests"] == 3 and efficiency["warm_up_requests"] == 2
    assert efficiency["total_s"]["n"] == 3 and efficiency["ttft_s"]["n"] == efficiency["tpot_s"]["n"] == 0
    said = remarks.times(efficiency)
    assert "median time of a batch" in said and "first token" not in said and "nan" not in said.lower()


def test_an_answer_of_one_token_has_no_time_per_further_token():
    lm = load("kvcompressed", **SNAPKV)
    lm.generate_until([request("generate_until", STORY, {"until": [], "max_gen_toks": 1})], disable_tqdm=True)
    (timing,) = (r.timing for r in lm.compression_log.records)
    assert timing.new_tokens == 1 and timing.ttft_s == timing.total_s and timing.tpot_s is None


def test_the_first_token_is_noted_once_as_the_second_forward_begins():
    model, notes, forwards = tiny_models.build("llama"), [], []
    hook = model.register_forward_hook(lambda *args: forwards.append(len(notes)))
    for new_tokens in (5, 1):
        notes.clear(), forwards.clear()
        with noting_first_token(model, lambda: notes.append(len(forwards))), torch.no_grad():
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        assert notes == ([1] if new_tokens > 1 else [])
        assert forwards == [0, 1, 1, 1, 1][:new_tokens]
    hook.remove()
    assert not model._forward_pre_hooks


class Peaks(PeakMemory):
    """A device that used 100 bytes before the first token and 30 after it."""

    def __init__(self) -> None:
        super().__init__({CPU})
        self.restarts = 0

    def restart(self) -> None:
        self.restarts += 1

    def read(self) -> int:
        return {1: 100, 2: 30}[self.restarts]


def test_prefill_and_decode_have_peaks_of_their_own():
    watch = Stopwatch(Peaks(), CPU)
    watch.first_token()
    watch.end()
    (timing,) = watch.timings(1, False, [4], steps=4)
    assert (timing.prefill_peak_bytes, timing.decode_peak_bytes) == (100, 30)


def test_time_in_cuts_is_summed():
    watch = Stopwatch(PeakMemory({CPU}), CPU)
    for _ in range(2):
        with watch.around_cut():
            time.sleep(0.01)
    watch.end()
    (timing,) = watch.timings(1, False)
    assert 0.02 <= timing.compression_s <= timing.total_s


@pytest.mark.parametrize("n", [1, 2, 3, 10, 57])
def test_the_spread_is_that_of_numpy(n):
    values = np.random.default_rng(n).normal(size=n).tolist()
    got = latency.spread(values)
    assert got["n"] == n
    assert [got[k] for k in ("p10", "median", "p90")] == pytest.approx(np.percentile(values, [10, 50, 90]).tolist())


def test_numbers_that_a_request_lacks_are_left_out_and_counted():
    timings = [Timing(1, i == 0, 1.0, 0.1, None, None, ttft_s=float(i) or None) for i in range(4)]
    timings.append(Timing(1, False, 1.0, None, 10, None))
    got = latency.summary(timings)
    assert (got["requests"], got["warm_up_requests"]) == (4, 1)
    assert got["ttft_s"] == {"median": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8), "n": 3}
    assert got["compression_s"]["n"] == 3 and got["prefill_peak_bytes"]["n"] == 1
    assert latency.summary([])["total_s"] == {"median": None, "p10": None, "p90": None, "n": 0}
    assert not any(
        isinstance(v, float) and math.isnan(v) for s in got.values() if isinstance(s, dict) for v in s.values()
    )


def test_answers_from_the_request_cache_are_counted_and_have_no_times(tmp_path):
    for known, asked in ((0, 2), (2, 3)):
        lm = load("kvcompressed", **SNAPKV)
        caching = CachingLM(lm, str(tmp_path / "a.db"))
        caching.generate_until(generations()[:asked])
        stats = lm.get_model_info()["kv_stats"]
        assert (stats["from_request_cache"], stats["requests"]) == (known, asked - known)
        caching.dbdict.close()


def test_logged_samples_carry_the_numbers_of_their_requests(tmp_path):
    args = "pretrained=kv-tiny,method=snapkv,max_capacity_prompt=100,window_size=16"
    common = ["--model", "kvcompressed", "--model_args", args, "--log_samples", "--batch_size", "2"]
    for folder, limit in (("first", "2"), ("second", "3")):
        tasks = ["--tasks", "kv_quickstart_needle,kv_quickstart_choice", "--limit", limit, "--use_cache", "answers"]
        done = run(*common, *tasks, "--output_path", folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for task in ("needle", "choice"):
        (file,) = (tmp_path / "second").rglob(f"samples_kv_quickstart_{task}_*.jsonl")
        samples = [json.loads(line)["efficiency"] for line in file.read_text().splitlines()]
        assert samples[:2] == [[{"from_request_cache": True}]] * 2
        (fresh,) = samples[2]
        assert fresh["prompt_tokens"] > 200 and fresh["kv_bytes_prefill"] > 0 and fresh["total_s"] > 0
        assert (fresh["ttft_s"] is None) is (task == "choice")
