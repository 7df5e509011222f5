"""Rotations that depend on the length of the whole sequence: dynamic NTK and longrope."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from on_device import DEVICE

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.check import Roads, wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.forward import generate_with
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.lent import starting_anew
from kv_lm_eval.engine.start import start
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError

BORDER = 60
SHORT = {"max_position_embeddings": BORDER}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": BORDER,
}


def made(config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.double().eval().to(DEVICE)


def dynamic() -> tf.PreTrainedModel:
    return made(tf.LlamaConfig(**{**tiny.LLAMA, **SHORT, "rope_parameters": dict(DYNAMIC)}))


def longrope() -> tf.PreTrainedModel:
    config = {**tiny.LLAMA, "max_position_embeddings": 240, "original_max_position_embeddings": BORDER}
    return made(tf.LlamaConfig(**{**config, "rope_parameters": {**LONG, "factor": 4.0}}))


def phi3() -> tf.PreTrainedModel:
    config = {**tiny.LLAMA, "max_position_embeddings": 240, "original_max_position_embeddings": BORDER}
    return made(tf.Phi3Config(**{**config, "rope_parameters": dict(LONG), "pad_token_id": 0, "eos_token_id": None}))


MODELS = [dynamic, longrope, phi3]


class Twins:
    """A model under our attention and its untouched twin."""

    def __init__(self, model: Callable[[], tf.PreTrainedModel]) -> None:
        self.model, self.stock = model(), model()
        self.facts = wrap(self.model, FULL)

    def cache(self, chunk: int | None = None, **settings: Any) -> Callable[[], Any]:
        compression = tiny.compression(**settings) if settings else FULL
        return partial(make_cache, compression, self.facts, chunk)

    @torch.no_grad()
    def generate(self, new_cache: Callable[[], Any], row: list[int], new: int) -> Any:
        cache, ids, mask, _ = start(self.model, new_cache, [row], None, 0)
        words = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        more = {"output_logits": True, "return_dict_in_generate": True}
        with starting_anew(self.model, cache):
            ours = self.model.generate(ids, attention_mask=mask, **words, **more, **generate_with(cache))
        self.stock(input_ids=torch.tensor([[1]]))  # so that its own frequencies are those of a fresh start
        theirs = self.stock.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **words, **more)
        return ours, theirs, cache


@pytest.fixture(params=MODELS, ids=lambda m: m.__name__)
def twins(request: pytest.FixtureRequest) -> Twins:
    return Twins(request.param)


def test_the_border_is_found(twins: Twins) -> None:
    assert twins.facts.border == BORDER
    assert twins.facts.settles == (twins.stock.config.rope_parameters["rope_type"] == "longrope")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_other_models_have_none(name: str) -> None:
    assert tiny.pair(name).facts.border is None


@pytest.mark.parametrize(("length", "new"), [(20, 8), (50, 30), (60, 5), (61, 5), (100, 20)])
def test_generation_equals_stock_before_at_across_and_beyond(twins: Twins, length: int, new: int) -> None:
    ours, theirs, _ = twins.generate(twins.cache(), tiny.tokens(length, seed=length), new)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert (a - b).abs().max() <= 1e-8


def test_what_was_asked_before_does_not_matter(twins: Twins) -> None:
    first, _, _ = twins.generate(twins.cache(), tiny.tokens(70), 3)
    twins.generate(twins.cache(), tiny.tokens(200), 3)
    again, _, _ = twins.generate(twins.cache(), tiny.tokens(70), 3)
    assert torch.equal(first.logits[0], again.logits[0])


def test_a_compressed_cache_is_prefilled_and_cut_again_where_the_model_starts_anew() -> None:
    twins, row = Twins(phi3), tiny.tokens(55)
    new_cache = twins.cache(method="knorm", max_capacity_prompt=16)
    ours, _, cache = twins.generate(new_cache, row, 12)
    assert cache.stores[0].length <= 16 + 7  # cut again at 61 tokens
    whole = [*row, *ours.sequences[0, len(row) : BORDER + 1].tolist()]
    alone, _, _ = twins.generate(new_cache, whole, 3)
    for a, b in zip(ours.logits[6:9], alone.logits, strict=True):
        assert (a - b).abs().max() <= 1e-8


def test_chunks_are_refused_beyond_the_border_and_exact_within(twins: Twins) -> None:
    ours, theirs, _ = twins.generate(twins.cache(chunk=16), tiny.tokens(50), 3)
    assert (ours.logits[0] - theirs.logits[0]).abs().max() <= 1e-8
    with pytest.raises(UserError, match=f"beyond {BORDER} tokens"):
        twins.generate(twins.cache(chunk=16), tiny.tokens(BORDER + 1), 3)


def one_forward(stock: tf.PreTrainedModel, context: list[int], continuation: list[int]) -> float:
    """The log-probability of a continuation as lm-eval's hf model has it."""
    with torch.inference_mode():
        stock(input_ids=torch.tensor([[1]]))
        logits = stock(input_ids=torch.tensor([(context + continuation)[:-1]])).logits[0].log_softmax(-1)
    first = len(context) - 1
    return float(sum(logits[first + i, t] for i, t in enumerate(continuation)))


@pytest.mark.parametrize("length", [20, 57, 90])
def test_choices_under_full_are_those_of_one_forward_each(twins: Twins, length: int) -> None:
    context = tiny.tokens(length, seed=length)
    continuations = [tiny.tokens(n, seed=n) for n in (1, 3, 6)]
    scores, _ = score_continuations(twins.model, twins.cache(), [context], [continuations], 1)
    for (got, _), continuation in zip(scores[0], continuations, strict=True):
        assert got == pytest.approx(one_forward(twins.stock, context, continuation), abs=1e-8)


@pytest.mark.parametrize("settings", [{}, {"compress_every": 4}], ids=["once", "online"])
def test_choices_do_not_depend_on_the_other_choices(twins: Twins, settings: dict[str, Any]) -> None:
    new_cache = twins.cache(method="knorm", max_capacity_prompt=20, **settings)
    context, continuations = tiny.tokens(58), [tiny.tokens(n, seed=n) for n in (1, 3, 9)]
    together, _ = score_continuations(twins.model, new_cache, [context], [continuations], 1)
    for one, continuation in zip(together[0], continuations, strict=True):
        alone, _ = score_continuations(twins.model, new_cache, [context], [[continuation]], 1)
        assert one[0] == pytest.approx(alone[0][0][0], abs=1e-8)


@pytest.mark.parametrize("settings", [{"method": "full"}, {"method": "knorm", "max_capacity_prompt": 20}], ids=str)
def test_documents_are_those_of_a_token_at_a_time(twins: Twins, settings: dict[str, Any]) -> None:
    document = tiny.tokens(90)
    whole, _ = score_documents(twins.model, twins.cache(**settings), [document], Stream(1, 8))
    cache = twins.cache(**settings)()
    cache.mode = "decode"
    schedule = type(cache.compression.schedule)(compress_every=8)
    cache.set(compression=cache.compression.__class__(**{**vars(cache.compression), "schedule": schedule}))
    expected = []
    with torch.inference_mode():
        for at, token in enumerate([1, *document[:-1]]):
            logits = twins.model(
                input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[at]]), **tiny.given(cache)
            ).logits
            expected.append(float(logits[0, -1].log_softmax(-1)[document[at]]))
    assert whole[0].log_probs.tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [BORDER, 32768])
def test_the_border_is_found_to_the_token_however_little_changes_there(context: int, dtype: torch.dtype) -> None:
    config = tf.LlamaConfig(
        **{**tiny.LLAMA, "max_position_embeddings": context, "rope_parameters": {**DYNAMIC, "factor": 2.0}}
    )
    facts = wrap(made(config).to(dtype), FULL)
    assert (facts.border, facts.settles) == (context, False)


def test_frequencies_that_every_token_changes_are_not_compiled() -> None:
    with pytest.raises(UserError, match="leave compile out"):
        wrap(dynamic(), FULL, Roads(compiled=True))
    wrap(longrope(), FULL, Roads(compiled=True))
