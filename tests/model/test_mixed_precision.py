"""mixed_precision_dtype: the model's layers run in another format, as lm-eval's hf runs them, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kv_lm_eval import plugin
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.methods import base
from kv_lm_eval.model import KVCompressedLM
from kv_lm_eval.tasks.quickstart import docs
from kv_lm_eval.tiny import resolve

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
GIVEN: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 2, "mixed_precision_dtype": "bfloat16"}


def request(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(kind, 0, 1))


def answers(lm: Any) -> tuple[list[str], list[float], list[float]]:
    needles, choice, page = (build()["test"].to_list()[:3] for build in (docs.needle, docs.choice, docs.ppl))
    asked = {"until": ["\n"], "max_gen_toks": 8}
    texts = lm.generate_until([request("generate_until", n["prompt"], asked) for n in needles], disable_tqdm=True)
    pairs = [request("loglikelihood", choice[0]["prompt"][-900:], f" {text}") for text in choice[0]["choices"]]
    scores = [score for score, _ in lm.loglikelihood(pairs, disable_tqdm=True)]
    rolling = lm.loglikelihood_rolling([request("loglikelihood_rolling", page[0]["page"][:1500])], disable_tqdm=True)
    return texts, scores, rolling


def test_the_full_cache_is_lm_evals_own_model() -> None:
    theirs = answers(HFLM(resolve("kv-tiny"), **GIVEN))
    ours = answers(KVCompressedLM("kv-tiny", method="full", **GIVEN))
    exact = answers(KVCompressedLM("kv-tiny", method="full", **{**GIVEN, "mixed_precision_dtype": None}))
    assert ours[0] == theirs[0]
    for mine, hf, float32 in zip(ours[1] + ours[2], theirs[1] + theirs[2], exact[1] + exact[2], strict=True):
        assert mine == pytest.approx(hf, rel=4e-3, abs=0.05)  # log-softmax is in bfloat16, as there
        assert mine != float32, "or nothing ran in the other format"


@pytest.mark.parametrize("name", base.available())
def test_nothing_is_scored_or_cut_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of float32 numbers would silently be one of bfloat16."""
    met = []

    def watched(what: str) -> None:
        original = getattr(Segment, what)

        def watching(self: Segment, *args: Any, **kwargs: Any) -> Any:
            met.append(torch.is_autocast_enabled("cpu"))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Segment, what, watching)

    for what in ("attend", "_after_attention", "_cut", "close"):
        watched(what)
    lm = KVCompressedLM("kv-tiny", **GIVEN, **base.example(name, 64))
    met.clear()  # the self-check's
    (needle,) = docs.needle()["test"].to_list()[:1]
    lm.generate_until([request("generate_until", needle["prompt"][-900:], {"max_gen_toks": 3})], disable_tqdm=True)
    assert not any(met)
    assert met or not base.load(name).uses_cache


def test_a_compiled_step_runs_in_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    from kv_lm_eval.engine import compiled

    original = compiled.Decoder.__init__

    def traced(self: Any, model: Any, backend: Any = "eager", autocast: Any = None) -> None:
        original(self, model, "eager", autocast)

    monkeypatch.setattr(compiled.Decoder, "__init__", traced)
    settings = {"method": "snapkv", "max_capacity_prompt": 128}
    one, other = (KVCompressedLM("kv-tiny", **GIVEN, **settings, compile=on) for on in (True, False))
    assert answers(one)[0] == answers(other)[0]
