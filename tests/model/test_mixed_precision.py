"""mixed_precision_dtype: the model's layers run in another format, as lm-eval's hf runs them, and nothing else does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.utils._python_dispatch import TorchDispatchMode

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


class Casts(TorchDispatchMode):
    """Counts how often each piece of memory is copied into another format."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.of[args[0].data_ptr()] += 1
        return function(*args, **kwargs or {})


def test_weights_are_cast_once_in_a_run() -> None:
    """As under lm-eval's hf, which is in autocast for a whole generate(); else every token would cast all of them."""
    lm = KVCompressedLM("kv-tiny", method="full", **GIVEN)
    weights = [p.data_ptr() for p in lm.model.parameters() if p.dim() == 2]
    asked = request("generate_until", docs.needle()["test"][0]["prompt"][-300:], {"until": [], "max_gen_toks": 6})
    with Casts() as casts:
        lm.generate_until([asked], disable_tqdm=True)
    counts = [casts.of[at] for at in weights]
    assert max(counts) == 1 and sum(counts) > 10, counts
