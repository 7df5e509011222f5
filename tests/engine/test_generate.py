"""generate() over a compressed cache is the plain loop: feed a token, take the best, cut when the schedule says so."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf

from kv_lm_eval.engine.generate import check_generation_settings
from kv_lm_eval.errors import UserError

NEW = 10
METHODS = {
    **{
        name: tiny.free(name, 12)
        for name in tiny.methods(lambda cls: cls.uses_cache and not cls.ring and not cls.reads_again)
    },
    "snapkv online": {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 12, "compress_every": 3},
    "knorm": {"method": "knorm", "keep_ratio": 0.4},
    "tova": {"method": "tova", "max_capacity_prompt": 12, "compress_every": 2},
    "streaming_llm in_cache": {"method": "streaming_llm", "n_sink": 2, "window_size": 10, "compress_every": 4},
}


def generated(model: tf.PreTrainedModel, rows: list[list[int]], cache: tf.Cache, **settings: object) -> list[list[int]]:
    ids, mask, _ = tiny.left_padded(rows)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            **tiny.given(cache),
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            pad_token_id=0,
            eos_token_id=None,
            do_sample=False,
            **settings,
        )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("name", "method"), tiny.cases(METHODS))
def test_generate_equals_the_loop_over_single_tokens(name: str, method: str) -> None:
    pair, lengths = tiny.pair(name), [50, 31, 7]
    rows = [tiny.tokens(n, seed=n) for n in lengths]
    expected = []
    for row in rows:
        cache, fed, out = pair.cache(**METHODS[method]), list(row), []
        for _ in range(NEW):
            start = len(row) + len(out) - len(fed)
            out.append(int(tiny.forward(pair.model, cache, [fed], starts=[start])[0, -1].argmax()))
            fed = out[-1:]
        expected.append(out)
    cache = pair.cache(**METHODS[method])
    assert generated(pair.model, rows, cache) == expected
    assert cache.seen == [n + NEW - 1 for n in lengths], "no token was fed twice"


@pytest.mark.parametrize("method", ["h2o", "snapkv online", "streaming_llm in_cache"])
def test_beams_carry_everything_of_their_cache_along(method: str) -> None:
    """Beam search again, with a fresh cache and the whole hypothesis fed anew for every candidate token."""
    pair, row, beams, steps = tiny.pair("llama"), tiny.tokens(30, seed=1), 3, 6
    cache = pair.cache(**METHODS[method])
    ids = torch.tensor([row])
    with torch.inference_mode():
        got = pair.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **tiny.given(cache),
            max_new_tokens=steps,
            min_new_tokens=steps,
            num_beams=beams,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0, len(row) :].tolist()
    hypotheses: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        candidates = []
        for total, tokens in hypotheses:
            fresh = pair.cache(**METHODS[method])
            logits = tiny.forward(pair.model, fresh, [row])[0, -1]
            for i, token in enumerate(tokens):
                logits = tiny.forward(pair.model, fresh, [[token]], starts=[len(row) + i])[0, -1]
            log_probs = logits.log_softmax(-1)
            candidates += [(total + float(log_probs[t]), [*tokens, t]) for t in log_probs.topk(beams).indices.tolist()]
        hypotheses = sorted(candidates, reverse=True)[:beams]
    assert got == hypotheses[0][1]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"cache_implementation": "static"}, "cache_implementation=static"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"assistant_model": object()}, "assisted decoding"),
        ({"prefill_chunk_size": 64}, "prefill_chunk_size"),  # the first chunk would be taken for the whole prompt
    ],
    ids=["cache_implementation", "prompt_lookup_num_tokens", "assistant_model", "prefill_chunk_size"],
)
def test_settings_of_generate_that_cannot_work_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_generation_settings(settings)
    check_generation_settings({"do_sample": True, "cache_implementation": None})


def test_a_compressed_cache_cannot_be_cropped() -> None:
    with pytest.raises(NotImplementedError, match="evicted tokens are gone"):
        tiny.pair("llama").cache(method="full").crop(1)
