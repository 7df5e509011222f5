"""One context, many questions: each goes on from the same cut context, as if it were the only one."""

from __future__ import annotations

import pytest
import tiny as models
import transformers as tf

from kv_lm_eval import UserError, compress, compressed_cache, prefill, tiny
from kv_lm_eval.engine.forward import generate_with
from kv_lm_eval.engine.generate import by_rows
from kv_lm_eval.engine.start import start

SNAPKV = {"method": "snapkv", "max_capacity_prompt": 16, "window_size": 4}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 96, "max_new_tokens": 6}
CHAT = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<bot>"


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    return models.build("llama")


def alone(context: list[int], question: list[int], **settings: object) -> list[int]:
    """The road of the evaluation with question_in_prompt=False."""
    pair, row = models.pair("llama"), context + question
    cache, ids, mask, _ = start(pair.model, lambda: pair.cache(**settings), [row], [len(question)], 0)
    words = {**generate_with(cache), **by_rows(cache), **GREEDY}
    out = pair.model.generate(input_ids=ids, attention_mask=mask, **words)
    new = out[0, ids.shape[1] :].tolist()
    return new[: new.index(96)] if 96 in new else new


@pytest.mark.parametrize("settings", [SNAPKV, {"method": "full"}, {**SNAPKV, "compress_every": 3}], ids=str)
def test_every_question_is_answered_as_the_only_one(model, settings):
    text, questions = models.tokens(40), [models.tokens(n, seed=n) for n in (1, 5, 9)]
    context = prefill(model, text, **settings)
    held = context.report()
    wanted = [alone(text, question, **settings) for question in questions]
    for _ in range(2):
        assert [context.ask(question, **GREEDY) for question in questions] == wanted
    assert context.report() == held and held.prompt_tokens == 40 and held.new_tokens == 0
    assert held.kv_bytes == (16 if settings["method"] == "snapkv" else 40) * 256
    assert context.answers.answers == 6


def test_the_context_is_read_once(model):
    read = []
    handle = model.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].numel()), with_kwargs=True)
    context = prefill(model, models.tokens(400), **SNAPKV)
    before = len(read)
    for n in (3, 4):
        context.ask(models.tokens(n, seed=n), **GREEDY)
    handle.remove()
    assert max(read[before:]) < 5


def test_a_context_is_read_twice_where_a_method_asks_for_it():
    model = tf.AutoModelForCausalLM.from_pretrained(tiny.path())
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.path())
    text = "The pass code is 4817. The ferry was late. " * 4
    context = prefill(model, text, tokenizer=tokenizer, method="kvzip", max_capacity_prompt=24)
    assert context.report().kv_bytes < context.report().kv_bytes_full
    assert context.ask("The pass code is", max_new_tokens=3)


@pytest.mark.parametrize("chat", [False, True])
def test_texts_are_asked_one_by_one_or_in_one_batch(chat):
    model = tf.AutoModelForCausalLM.from_pretrained(tiny.path())
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.path())
    if chat:
        tokenizer.chat_template = CHAT
    text = "The pass code is 4817. " + "The river was calm and the ferry was late. " * 8
    context = prefill(model, text, "snapkv", tokenizer=tokenizer, chat=chat, max_capacity_prompt=64, window_size=8)
    if chat:
        assert tokenizer.decode(context.ids).startswith("<user>The pass")
    questions = ["The pass code is", "Who was late? The"]
    one = [context.ask(question, max_new_tokens=5, do_sample=False) for question in questions]
    assert context.ask(questions, max_new_tokens=5, do_sample=False) == one
    assert all(isinstance(answer, str) for answer in one)


def test_mistakes_are_told_in_one_line(model):
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.path())
    tokenizer.chat_template = None
    context = prefill(model, models.tokens(20), **SNAPKV)
    for words, mistake in {
        "needs a tokenizer": lambda: prefill(model, "text", **SNAPKV),
        "a question in words": lambda: context.ask("why?"),
        "empty question": lambda: context.ask([]),
        "context is empty": lambda: prefill(model, [], **SNAPKV),
        "no chat template": lambda: prefill(model, "text", tokenizer=tokenizer, chat=True, **SNAPKV),
        "leave chat out": lambda: prefill(model, [1, 2], chat=True, **SNAPKV),
        "one answer a question": lambda: context.ask([1], num_beams=2),
        "no cache that could be held": lambda: prefill(model, [1, 2], method="no_cache"),
        "whole numbers": lambda: prefill(model, [0.5], **SNAPKV),
    }.items():
        with pytest.raises(UserError, match=words) as error:
            mistake()
        assert "\n" not in str(error.value)


def test_a_context_that_is_read_again_is_read_in_the_words_of_its_tokenizer(model):
    net, tokenizer = tf.AutoModelForCausalLM.from_pretrained(tiny.path()), tf.AutoTokenizer.from_pretrained(tiny.path())
    context = prefill(net, "the quick brown fox " * 20, method="kvzip", max_capacity_prompt=16, tokenizer=tokenizer)
    assert context.report().kept_fraction < 0.5 and isinstance(context.ask(" jumps", max_new_tokens=3), str)
    with pytest.raises(
        UserError, match=r"needs a tokenizer: prefill\(model, ..., tokenizer=tokenizer, method='kvzip'\)"
    ):
        prefill(model, models.tokens(40), method="kvzip", max_capacity_prompt=16)
    with (
        pytest.raises(
            UserError, match=r"needs a tokenizer: compress\(model, ..., tokenizer=tokenizer, method='kvzip'\)"
        ),
        compress(model, method="kvzip", max_capacity_prompt=16),
    ):
        pytest.fail("told on entering")
    with (
        pytest.raises(UserError, match=r"compressed_cache\(\): method=kvzip reads a prompt twice"),
        compressed_cache(model, method="kvzip", max_capacity_prompt=16),
    ):
        pass
