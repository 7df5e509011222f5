"""Each protocol's numbers against plain loops over the stock model, token by token."""

from __future__ import annotations

import math
import pickle
import re

import pytest
import tiny as tiny_models
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import reading

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = (
    "The harbour was quiet that morning, and the boats lay still. Nobody had seen the ferry since the storm; gulls "
    "walked on the stones as if they owned them. “Ça va?” asked the old man — nobody answered. 日本語 too. "
)


@pytest.fixture(scope="module")
def stock():
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path(), attn_implementation="eager").float().eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def load():
    made = {}

    def of(batch_size=1, **args):
        key = (batch_size, *sorted(args.items()))
        if key not in made:
            arguments = {"pretrained": "kv-tiny", "dtype": "float32", "device": "cpu", "batch_size": batch_size, **args}
            made[key] = get_model("kvcompressed").create_from_arg_obj(arguments)
        return made[key]

    return of


def ask(model, *documents, **reading):
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text, reading) if reading else (text,),
                 idx=0, metadata=("t", i, 1))
        for i, text in enumerate(documents)
    ]  # fmt: skip
    return model.loglikelihood_rolling(requests, disable_tqdm=True)


@torch.inference_mode()
def next_token_log_probs(model, row, visible):
    """log p(row[i + 1] | the tokens that query i may see), true positions, from one forward under an explicit mask."""
    n = len(row) - 1
    mask = torch.full((1, 1, n, n), torch.finfo(torch.float32).min)
    for query, keys in enumerate(visible):
        mask[0, 0, query, keys] = 0
    logits = model(input_ids=torch.tensor([row[:-1]]), attention_mask=mask, use_cache=False).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0], logits.argmax(-1)


def simulate(n, prefill, n_sink, window, every):
    """The tokens that each of n queries sees and the cuts, by a list of what is held."""
    held, visible, cuts = [], [], []
    for t in range(n):
        held.append(t)
        visible.append(list(range(t + 1)) if t < prefill else list(held))
        ends_prefill = t == prefill - 1 and len(held) > n_sink + window
        if ends_prefill or (t >= prefill and len(held) - (n_sink + window) >= every):
            before = len(held)
            held = held[:n_sink] + held[-window:]
            cuts.append((t + 1, before - len(held)))
    return visible, cuts


@pytest.mark.parametrize("prefill", [0, 20, 45])
@pytest.mark.parametrize("every", [1, 8])
def test_carried_protocols_equal_a_mask_over_the_simulated_cache(stock, load, prefill, every):
    model, tokenizer = stock
    ours = load(method="streaming_llm", n_sink=2, window_size=18, positions="absolute", compress_every=every)
    reading = {"protocol": "prefill_then_stream", "prefill_tokens": prefill} if prefill else {"protocol": "streaming"}
    (score,) = ask(ours, TEXT, **reading)
    row = [ours.prefix_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]
    visible, cuts = simulate(len(row) - 1, prefill, 2, 18, every)
    expected, likely = next_token_log_probs(model, row, visible)
    record = score.record
    assert record.tokens.tolist() == row[1:]
    torch.testing.assert_close(torch.from_numpy(record.log_probs), expected, atol=2e-4, rtol=1e-4)
    assert record.greedy.tolist() == (likely == torch.tensor(row[1:])).tolist()
    assert record.evictions == cuts
    assert record.slots.tolist() == [len(v) for v in visible]
    assert record.after_first_eviction().tolist() == [t >= cuts[0][0] for t in range(len(row) - 1)]
    assert score == pytest.approx(expected.double().sum().item(), abs=1e-2)


def test_the_first_forward_holds_what_the_method_keeps_unless_said_otherwise(load):
    ours = load(method="streaming_llm", n_sink=2, window_size=18, positions="absolute", compress_every=1)
    (by_default,) = ask(ours, TEXT, protocol="prefill_then_stream")
    (asked,) = ask(ours, TEXT, protocol="prefill_then_stream", prefill_tokens=20)
    assert by_default == asked and by_default.record.reading["prefill_tokens"] == 20


@torch.inference_mode()
def test_streaming_the_full_cache_is_the_stock_model_token_by_token(stock, load):
    model, tokenizer = stock
    ours = load(method="full")
    (score,) = ask(ours, TEXT, protocol="streaming")
    row = [ours.prefix_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]
    cache, expected = transformers.DynamicCache(), []
    for now, then in zip(row, row[1:], strict=False):
        logits = model(input_ids=torch.tensor([[now]]), **tiny_models.given(cache), use_cache=True).logits[0, -1]
        expected.append(logits.log_softmax(-1)[then].item())
    assert score.record.log_probs.tolist() == pytest.approx(expected, abs=1e-4)
    assert score.record.evictions == [] and not score.record.after_first_eviction().any()


@torch.inference_mode()
@pytest.mark.parametrize(("length", "stride"), [(32, 16), (32, 32), (50, 7), (4000, 512)])
def test_strided_equals_the_recipe_of_the_transformers_documentation(stock, load, length, stride):
    model, tokenizer = stock
    ours = load(method="full", batch_size=3)
    (score,) = ask(ours, TEXT, protocol="strided", strided_length=length, stride=stride)
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        logits = model(input_ids=ids[:, begin:end], use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
        previous_end = end
        if end == ids.shape[1]:
            break
    assert -score == pytest.approx(float(total), rel=1e-5)
    assert int(score.record.scored.sum()) == count


@torch.inference_mode()
def test_a_recomputed_window_streams_without_a_cache(stock, load):
    model, tokenizer = stock
    ours = load(method="window_recompute", n_sink=2, window_size=18, batch_size=3)
    row = [ours.prefix_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]
    expected = []
    for t, then in enumerate(row[1:]):
        logits = model(torch.tensor([row[max(0, t - 19) : t + 1]]), use_cache=False).logits[0, -1]
        expected.append(logits.log_softmax(-1)[then].item())
    for (score,) in (ask(ours, TEXT), ask(ours, TEXT, protocol="streaming")):
        assert score.record.log_probs.tolist() == pytest.approx(expected, abs=1e-4)
        assert score.record.reading["protocol"] == "streaming" and score.record.reading["recomputed_tokens"] == 20


def test_rolling_is_the_number_of_lm_evals_own_model(stock, load):
    hf = get_model("hf").create_from_arg_obj(
        {"pretrained": tiny.path(), "dtype": "float32", "device": "cpu", "batch_size": 1, "max_length": 40}
    )
    ours = load(method="full", max_length=40, batch_size=2)
    expected = ask(hf, TEXT, TEXT[:50])
    assert ask(ours, TEXT, TEXT[:50], protocol="rolling") == pytest.approx(expected, rel=1e-5)
    assert ask(ours, TEXT, TEXT[:50]) == pytest.approx(expected, rel=1e-5)  # asked as lm-eval's tasks do
    assert load(method="no_cache", max_length=40).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (TEXT, {"protocol": "rolling"}), 0, ("t", 0, 1))]
    ) == pytest.approx(expected[:1], rel=1e-5)


@pytest.mark.parametrize(
    "reading", [{"protocol": "rolling"}, {"protocol": "strided", "strided_length": 32}, {"protocol": "streaming"}]
)
def test_a_limit_scores_the_first_tokens_and_names_the_text_they_stand_for(stock, load, reading):
    _, tokenizer = stock
    ours = load(method="full")
    (whole,) = ask(ours, TEXT, **reading)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    ends = set()
    for most in range(2, len(ids) + 3, 5):
        (score,) = ask(ours, TEXT, **reading, max_eval_tokens=most)
        record = score.record
        n = len(record.tokens)
        assert record.tokens.tolist() == ids[:n]
        assert tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) == TEXT[: record.end]
        assert n == min(most, len(ids)) or "\ufffd" in tokenizer.decode(ids[: n + 1])
        if reading["protocol"] == "streaming":
            assert record.log_probs.tolist() == pytest.approx(whole.record.log_probs[:n].tolist(), abs=1e-4)
        ends.add(record.end)
    assert len(TEXT) in ends


class Shouting:
    """A tokenizer whose decoding does not give the text back: offsets are all there is."""

    def __init__(self, tokenizer, is_fast):
        self.tokenizer, self.is_fast = tokenizer, is_fast

    def __call__(self, text, **settings):
        return self.tokenizer(text, **settings)

    def decode(self, ids, **settings):
        return self.tokenizer.decode(ids).upper()


def test_without_an_exact_decoding_offsets_say_what_was_scored_and_without_either_nothing_is(stock, load):
    _, tokenizer = stock
    lm, ids = load(method="full"), tokenizer.encode(TEXT, add_special_tokens=False)
    own = lm.tokenizer
    try:
        lm.tokenizer = Shouting(own, is_fast=True)
        for most in range(2, len(ids), 3):
            tokens, end = reading.first(lm, TEXT, ids, most, own_special=False)
            part = tokenizer.decode(tokens)
            assert tokens == ids[: len(tokens)] and TEXT[:end].strip() == part.strip()
            assert len(tokens) == most or "\ufffd" in tokenizer.decode(ids[: len(tokens) + 1])
        lm.tokenizer = Shouting(own, is_fast=False)
        with pytest.raises(UserError, match="does not say which text"):
            reading.first(lm, TEXT, ids, 20, own_special=False)
    finally:
        lm.tokenizer = own


def test_batches_do_not_change_a_number_and_answers_survive_pickling(load):
    settings = {"method": "streaming_llm", "n_sink": 2, "window_size": 18, "compress_every": 4}
    texts = [TEXT, TEXT[:70], TEXT[20:]]
    alone, together = (ask(load(batch_size=b, **settings), *texts, protocol="streaming") for b in (1, 3))
    for a, b in zip(alone, together, strict=True):
        assert a == pytest.approx(b, abs=1e-3) and a.record.evictions == b.record.evictions
    again = pickle.loads(pickle.dumps(alone[0]))
    assert again == alone[0] and again.record.tokens.tolist() == alone[0].record.tokens.tolist()


@pytest.mark.parametrize(
    ("settings", "reading", "message"),
    [
        ({"method": "window", "window_size": 8}, {"protocol": "rolling"}, "under another name"),
        ({"method": "window", "window_size": 8}, {"protocol": "strided"}, "under another name"),
        ({"method": "no_cache"}, {"protocol": "streaming"}, "has none"),
        ({"method": "window_recompute"}, {"protocol": "rolling"}, "under another name"),
        ({"method": "full"}, {"protocol": "steaming"}, "did you mean 'streaming'"),
        ({"method": "full"}, {"protocol": "streaming", "stride": 4}, "no effect"),
        ({"method": "full"}, {"protocol": "strided", "stride": 9, "strided_length": 8}, "never be scored"),
        ({"method": "full"}, {"protocol": "strided", "strided_length": 10**6}, "passes the model's maximum"),
        ({"method": "full"}, {"protocol": "rolling", "max_eval_tokens": 1.5}, "whole number"),
        (
            {"method": "knorm", "keep_ratio": 0.5, "compress_every": 4},
            {"protocol": "prefill_then_stream"},
            '"prefill_tokens": N',
        ),
    ],
)
def test_a_reading_that_would_not_be_what_its_name_says_is_refused(load, settings, reading, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ask(load(**settings), TEXT, **reading)


def test_perplexity_of_a_uniform_guess_is_the_number_of_guesses(load):
    from kv_lm_eval.metrics.perplexity import bits, perplexity, ratio

    assert perplexity([(-3 * math.log(7), 3), (-5 * math.log(7), 5)]) == pytest.approx(7)
    assert bits([(-6 * math.log(2), 3)]) == pytest.approx(2)
    assert perplexity([]) == ratio([(0.0, 0)]) == "N/A" and perplexity([(-1e6, 1)]) == math.inf
