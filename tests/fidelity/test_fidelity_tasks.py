"""The tasks through lm-eval on the embedded model: what is counted, how methods are ordered, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kv_lm_eval import tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.stats import blocks, fidelity

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = Path(tiny.__file__).parents[1] / "tasks" / "quickstart" / "texts"
KNORM = {"method": "knorm", "max_capacity_prompt": 64}


@pytest.fixture(scope="module")
def ask(run):
    def texts(task="kv_fidelity_file", tokens=400, metadata=None, **asked):
        return run(task, metadata={"text_files": str(TEXTS), "max_eval_tokens": tokens, **(metadata or {})}, **asked)

    texts.anew = lambda **asked: run.anew(
        "kv_fidelity_file", metadata={"text_files": str(TEXTS), "max_eval_tokens": 100}, **asked
    )
    return texts


def scores(results):
    (found,) = results["results"].values()
    return {k.split(",")[0]: v for k, v in found.items() if "stderr" not in k and "," in k}


def per_token(results):
    (samples,) = results["samples"].values()
    return [s["doc"]["per_token"] for s in sorted(samples, key=lambda s: s["doc_id"])]


def test_every_number_of_the_table_is_that_of_all_tokens_together(ask):
    results = ask(**KNORM)
    got, records = scores(results), per_token(results)
    kl = np.concatenate([r["kl"] for r in records])
    ours, base = (-np.concatenate([r[name] for r in records]) for name in ("nll", "base_nll"))
    same = np.concatenate([r["same_top"] for r in records])
    late = np.concatenate([np.arange(len(r["kl"])) >= r["first_eviction"] for r in records])
    wanted = fidelity.of_tokens(kl, base, ours, same)
    assert len(records) == 2 and got["scored_tokens"] == len(kl) == 800
    assert got["kl_mean"] == pytest.approx(wanted.kl.value, rel=1e-3)
    assert got["kl_mean_se"] == pytest.approx(wanted.kl.error, rel=1e-3)
    assert got["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert got["kl_max"] == pytest.approx(kl.max(), rel=1e-3)
    assert got["kl_before_eviction"] < 1e-9 < 1e-3 < got["kl_after_eviction"]
    assert got["kl_after_eviction"] == pytest.approx(kl[late].mean(), rel=1e-3)
    assert got["same_top"] == pytest.approx(same.mean())
    assert got["ppl_ratio"] == pytest.approx(math.exp((base - ours).mean()), rel=1e-4)
    assert got["log_prob_correlation"] == pytest.approx(np.corrcoef(ours, base)[0, 1], rel=1e-4)
    assert got["kl_low"] < got["kl_mean"] < got["kl_high"]
    assert 0 <= got["kl_noise_floor"] < 1e-9 < got["kl_noise_floor_bfloat16"] < got["kl_mean"]


def test_both_perplexities_are_those_of_runs_of_their_own(ask):
    beside = scores(ask(**KNORM))
    alone = scores(ask(task="kv_ppl_file", **KNORM))
    full = scores(ask(task="kv_ppl_file", method="full"))
    assert beside["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert beside["perplexity_base"] == pytest.approx(full["perplexity"], rel=1e-6)


def test_the_full_cache_is_at_no_distance_from_itself(ask):
    got = scores(ask(method="full"))
    assert got["kl_max"] < 1e-9 and got["same_top"] == 1
    assert got["kl_after_eviction"] == "N/A"


def in_order(found):
    """Whether each run is below the next in mean KL, the interval of their difference on the same tokens above 0."""
    for fewer, more in zip(found, found[1:], strict=False):
        difference = [np.subtract(b["kl"], a["kl"]) for a, b in zip(per_token(fewer), per_token(more), strict=True)]
        if not blocks.interval(difference)["low"] > 0:
            return False
    return True


@pytest.mark.parametrize("method", ["knorm", "snapkv"])
def test_the_less_is_kept_the_larger_the_divergence(ask, method):
    more = {"window_size": 16} if method == "snapkv" else {}
    assert in_order([ask(method=method, keep_ratio=share, tokens=300, **more) for share in (0.5, 0.25, 0.1)])


def test_the_fewer_bits_the_larger_the_divergence(ask):
    assert in_order([ask(method="quantized", nbits=bits, tokens=300) for bits in (8, 4, 2)])


def test_a_batch_and_the_request_cache_give_the_same_numbers(ask, tmp_path):
    cache = str(tmp_path / "answers")
    first, again = (ask.anew(use_cache=cache, **KNORM) for _ in range(2))
    assert scores(again) == scores(first)
    assert again["config"]["kv_stats"]["requests"] == 0
    together, apart = (scores(ask(**{"batch": size} if size > 1 else {}, **KNORM)) for size in (2, 1))
    for name, value in apart.items():
        assert together[name] == value or together[name] == pytest.approx(value, rel=1e-3, abs=1e-8), name


def test_the_setting_adds_the_numbers_to_other_tasks_of_documents_and_takes_the_times_away(ask):
    plain, beside = ask(task="kv_ppl_file", **KNORM), ask(task="kv_ppl_file", fidelity=True, **KNORM)
    assert scores(plain) == scores(beside)
    assert "kl" not in per_token(plain)[0]
    assert len(per_token(beside)[0]["kl"]) == 400
    assert "efficiency" in plain["config"]["kv_stats"] and "efficiency" not in beside["config"]["kv_stats"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metadata": {"protocol": "rolling"}, "method": "full"}, "nothing to compare"),
        ({"model": "hf"}, "needs --model kvcompressed"),
        ({"method": "no_cache"}, "carries one cache across a document|has none"),
        ({"method": "window_recompute", "window_size": 16}, "has none"),
        ({"method": "no_cache", "fidelity": True}, "has none"),
    ],
)
def test_what_cannot_be_compared_is_told(ask, more, message):
    with pytest.raises(UserError, match=message):
        ask(**more)
