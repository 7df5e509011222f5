"""One loaded model object under many LM objects, lm-eval's own among them: each answers as on a fresh load."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny as tiny_models
import torch
import transformers
from lm_eval.api.registry import get_model
from model.test_requests import STORY, request

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: list[dict[str, Any]] = [
    {},  # lm-eval's hf
    {"method": "full"},
    {"method": "no_cache"},
    {"method": "window_recompute", "window_size": 12},
    {"method": "streaming_llm", "window_size": 20, "n_sink": 2},
    {"method": "snapkv", "max_capacity_prompt": 24, "window_size": 4},
    {"method": "streaming_ring", "window_size": 20, "n_sink": 2},
    {"method": "quantized", "nbits": 4, "residual_length": 8, "group_size": 8},
]
TEXT = STORY[:180]
ASKED = {
    "generate_until": [request("generate_until", TEXT[:n], {"until": [], "max_gen_toks": 4}) for n in (180, 90)],
    "loglikelihood": [request("loglikelihood", TEXT[:n], c) for n in (160, 70) for c in (" The boats", " 48213")],
    "loglikelihood_rolling": [request("loglikelihood_rolling", TEXT)],
}


def model() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)


def lm(loaded: Any, settings: dict[str, Any]) -> Any:
    of = "kvcompressed" if settings else "hf"
    return get_model(of)(pretrained=loaded, tokenizer=tiny.path(), device="cpu", batch_size=2, **settings)


@pytest.fixture(scope="module")
def fresh() -> dict[tuple[int, str], Any]:
    """The answers of each kind of LM to each type of request, each on a load of its own."""
    out = {}
    for i, settings in enumerate(KINDS):
        one = lm(model(), settings)
        out.update({(i, kind): getattr(one, kind)(asked) for kind, asked in ASKED.items()})
    return out


def state(loaded: transformers.PreTrainedModel) -> dict[str, Any]:
    """What could be left behind on a model object, weights aside."""
    return {
        "attention": [m.config._attn_implementation for m in loaded.modules() if hasattr(m, "config")],
        "own": [sorted(m.__dict__) for m in loaded.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in loaded.modules()],
        "config": loaded.config.to_dict(),
        "generation": loaded.generation_config.to_dict(),
    }


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_methods_and_of_hf_answers_as_a_fresh_load(seed: int, fresh: dict[tuple[int, str], Any]) -> None:
    draw, loaded = random.Random(seed), model()
    if seed == 2:
        loaded.set_attn_implementation("eager")
    before, live = state(loaded), {}
    todo = [(i, kind) for i in range(len(KINDS)) for kind in ASKED]
    draw.shuffle(todo)
    for i, kind in todo:
        if i not in live or draw.random() < 0.3:  # made once more, or one that lived through the others' calls
            live[i] = lm(loaded, KINDS[i])
        assert state(loaded) == before, f"{KINDS[i]} left something on the model"
        got = getattr(live[i], kind)(ASKED[kind])
        assert state(loaded) == before, f"{kind} of {KINDS[i]} left something on the model"
        if kind == "generate_until":
            assert got == fresh[i, kind], KINDS[i]
        else:
            assert torch.allclose(torch.tensor(got), torch.tensor(fresh[i, kind]), rtol=0, atol=1e-4), KINDS[i]
    assert len({str(fresh[i, "loglikelihood"]) for i in range(len(KINDS))}) > 4  # they can be told apart


def test_a_run_that_fails_leaves_the_model_as_it_was() -> None:
    loaded = model()
    before = state(loaded)
    for settings in KINDS[1:]:
        one = lm(loaded, settings)
        with pytest.raises(UserError):
            one.generate_until([request("generate_until", "", {"until": [], "max_gen_toks": 4})])
        one.tok_batch_encode = None  # something of its own breaks in the middle of the work
        with pytest.raises(TypeError):
            one.generate_until(ASKED["generate_until"])
        assert state(loaded) == before


def test_a_model_that_is_refused_is_as_it_was() -> None:
    gpt2 = tiny_models.build("gpt2")
    before = state(gpt2)
    with pytest.raises(UserError):
        lm(gpt2, {"method": "streaming_llm", "window_size": 20, "n_sink": 2})
    assert state(gpt2) == before
