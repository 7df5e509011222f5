"""Where what always stays is more than was asked, the run says so and counts the requests."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from kv_lm_eval import plugin

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = "the boats lay still and nobody had seen the ferry since the storm "


def stats(caplog: pytest.LogCaptureFixture, kind: str, **args: Any) -> tuple[dict[str, Any], str]:
    lm = get_model("kvcompressed").create_from_arg_obj(
        {"pretrained": "kv-tiny", "dtype": "float32", **args}, {"batch_size": 2, "device": "cpu"}
    )
    more = {"generate_until": {"until": ["\n"], "max_gen_toks": 3}, "loglikelihood": " ferry"}[kind]
    asked = [
        Instance(request_type=kind, doc={}, arguments=(WORDS * n, more), idx=i, metadata=("t", i, 1))
        for i, n in enumerate((1, 4, 16))  # some 15, 60 and 240 tokens
    ]
    getattr(lm, kind)(asked, disable_tqdm=True)
    with caplog.at_level(logging.WARNING):
        return lm.get_model_info()["kv_stats"], caplog.text


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_a_share_below_the_window_is_counted_and_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    got, said = stats(caplog, kind, method="snapkv", window_size=16, keep_ratio=0.2)
    assert got["over_budget"] == got["by_task"]["t"]["over_budget"] == 2
    assert "2 of 3 requests kept what always stays" in said and "'keep_ratio': 0.2" in said and "16 slots" in said


@pytest.mark.parametrize(
    "args",
    [
        {"method": "snapkv", "window_size": 2, "keep_ratio": 0.3},
        {"method": "knorm", "keep_ratio": 0.2},
        {"method": "snapkv", "window_size": 16, "max_capacity_prompt": 24},
        {"method": "window", "keep_ratio": 0.5},
        {"method": "quantized"},
        {"method": "full"},
        {"method": "no_cache"},
    ],
)
def test_a_budget_that_is_kept_is_not_warned_of(args: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    got, said = stats(caplog, "generate_until", **args)
    assert got["over_budget"] == 0 and "always stays" not in said


def test_a_share_of_less_than_one_token_keeps_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    got, said = stats(caplog, "generate_until", method="knorm", keep_ratio=0.02)
    assert got["over_budget"] == 1 and "1 slots" in said
