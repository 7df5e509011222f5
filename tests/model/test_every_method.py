"""Every method answers the three request types of the quick start: by rule, so that a new file is among them."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from kv_lm_eval import plugin
from kv_lm_eval.methods import base
from kv_lm_eval.metrics.compression import CompressionLog
from kv_lm_eval.model import KVCompressedLM
from kv_lm_eval.sharing import under
from kv_lm_eval.tasks.quickstart import docs

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
SLOTS, TOKENS = 64, {"until": ["\n"], "max_gen_toks": 4}
FIXED = {"device": "cpu", "dtype": "float32", "batch_size": 4}
FORMATS = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"mixed_precision_dtype": "bfloat16"},
    {"mixed_precision_dtype": "float16"},
]


Loaded = tuple[KVCompressedLM, dict[str, Any]]  # and how it was


@pytest.fixture(scope="module", params=FORMATS, ids=lambda given: "-".join(map(" ".join, given.items())) or "float32")
def loaded(request: pytest.FixtureRequest) -> Loaded:
    given = FIXED | request.param
    return KVCompressedLM("kv-tiny", method="full", **given), given


def request(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(kind, 0, 1))


@functools.cache
def asked() -> dict[str, list[Instance]]:
    """The first document of each task, the end of its prompt or the beginning of its text: about 200 tokens."""
    needle, choice, page = (build()["test"].to_list()[0] for build in (docs.needle, docs.choice, docs.ppl))
    return {
        "generate_until": [request("generate_until", needle["prompt"][-800:], TOKENS)],
        "loglikelihood": [request("loglikelihood", choice["prompt"][-800:], f" {text}") for text in choice["choices"]],
        "loglikelihood_rolling": [request("loglikelihood_rolling", page["page"][:800])],
    }


@pytest.mark.parametrize("name", base.available())
def test_every_method_answers_all_three_request_types_in_every_format(name: str, loaded: Loaded) -> None:
    lm = under(loaded[0], "kv-tiny", **loaded[1], **base.example(name, SLOTS))
    requests = asked()
    lm.compression_log = log = CompressionLog()
    (text,) = lm.generate_until(requests["generate_until"], disable_tqdm=True)
    assert isinstance(text, str)
    scored = lm.loglikelihood(requests["loglikelihood"], disable_tqdm=True)
    assert len(scored) == 4 and all(math.isfinite(p) and p < 0 for p, _ in scored)
    (rolling,) = lm.loglikelihood_rolling(requests["loglikelihood_rolling"], disable_tqdm=True)
    assert math.isfinite(rolling) and rolling < 0
    cls = base.load(name)
    changes = cls.compresses or (cls.uses_cache and name != "full")
    assert len(log.records) == 3, "a context each, whatever follows it"
    assert all(record.compressed == changes for record in log.records), "or its example shows nothing"
