"""On real weights: `full` answers as lm-eval's hf, a batch as its rows do alone, and generation is a plain loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import real_models as real
import torch
from model.test_requests import request

pytestmark = pytest.mark.filterwarnings("ignore")
COMPRESSED: list[dict[str, Any]] = [
    {"method": "snapkv", "max_capacity_prompt": 32, "window_size": 8},
    {"method": "adakv", "max_capacity_prompt": 32, "window_size": 8, "compress_every": 4},
    {"method": "streaming_llm", "window_size": 28, "compress_every": 4},
    {"method": "quantized", "nbits": 4, "group_size": 32, "residual_length": 32},
]
NEW = 6


def requests(kind: str) -> list[Any]:
    """Few and of different lengths, so that a batch is padded."""
    lengths = (400, 130, 270)
    if kind == "generate_until":
        asked = [(real.text(n, 10 * n), {"until": [], "max_gen_toks": NEW}) for n in lengths]
    elif kind == "loglikelihood":
        asked = [(real.text(n, 10 * n), c) for n in lengths for c in (" the value of the name", " bananas")]
    else:
        asked = [(real.text(n, 10 * n),) for n in lengths]
    return [request(kind, *one) for one in asked]


def answers(lm: Any) -> dict[str, Any]:
    kinds = ("generate_until", "loglikelihood", "loglikelihood_rolling")
    return {kind: getattr(lm, kind)(requests(kind), disable_tqdm=True) for kind in kinds}


def numbers(found: dict[str, Any]) -> list[float]:
    return [float(x) for x, _ in found["loglikelihood"]] + [float(x) for x in found["loglikelihood_rolling"]]


def same(got: dict[str, Any], expected: dict[str, Any], nats: float) -> None:
    assert got["generate_until"] == expected["generate_until"]
    assert [bool(greedy) for _, greedy in got["loglikelihood"]] == [bool(g) for _, g in expected["loglikelihood"]]
    assert numbers(got) == pytest.approx(numbers(expected), abs=nats)


@pytest.fixture(scope="module", params=real.NAMES)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    real.folder(request.param)
    yield request.param
    gc.collect()


def test_full_answers_as_lm_evals_own_model(name: str) -> None:
    expected = answers(real.load(name, "hf"))
    gc.collect()
    same(answers(real.load(name, method="full", batch_size=3)), expected, nats=5e-3)  # of some 200 nats a text


@pytest.mark.parametrize("settings", COMPRESSED, ids=lambda s: s["method"])
def test_a_batch_answers_as_its_rows_do_alone(name: str, settings: dict[str, Any]) -> None:
    lm = real.load(name, **settings)
    alone = answers(lm)
    lm = None
    gc.collect()
    together = real.load(name, batch_size=3, **settings)
    same(answers(together), alone, nats=2e-2)


def test_generation_is_a_plain_loop_of_whole_forwards(name: str) -> None:
    """Without any cache at all, by transformers alone."""
    model, tokenizer = real.stock(name), real.tokenizer(name)
    expected = []
    for one in requests("generate_until"):
        ids = tokenizer(one.args[0], return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(NEW):
            with torch.inference_mode():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    del model
    gc.collect()
    lm = real.load(name, method="full", batch_size=3)
    got = lm.generate_until(requests("generate_until"), disable_tqdm=True)
    assert got == expected
    assert all(len(text) > 3 for text in got)
