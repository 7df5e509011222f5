"""Generation settings by lm-eval's own reading, and what cannot be: one line before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from model.test_requests import METHODS, STORY, load, request

from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import generation
from kv_lm_eval.requests.boundaries import Boundary
from kv_lm_eval.requests.prompt import Prompt

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = STORY + "The number is"  # 48 tokens or so
LENGTHS = {
    "max_gen_toks": {"max_gen_toks": 16},
    "max_new_tokens": {"max_new_tokens": 16},
    "max_tokens": {"max_tokens": 16},
    "max_completion_tokens": {"max_completion_tokens": 16},
    "a text": {"max_tokens": "16"},
    "a fraction": {"max_gen_toks": 16.0},
    "none and another name": {"max_gen_toks": None, "max_tokens": 16},
    "the first of several": {"max_completion_tokens": 400, "max_tokens": 300, "max_new_tokens": 16},
}


@pytest.fixture(scope="module")
def models():
    return {name: load(name, **({"method": "full"} if name != "hf" else {})) for name in ("kvcompressed", "hf")}


def ask(lm, prompt: str = PROMPT, **settings):
    settings = {"until": [], **settings}
    return lm.generate_until([request("generate_until", prompt, settings)], disable_tqdm=True)


def tokens(lm, answers: list[str]) -> int:
    return len(lm.tok_encode(answers[0], add_special_tokens=False))


@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_by_any_name_is_that_of_lm_evals_model(name, models):
    got = ask(models["kvcompressed"], **LENGTHS[name])
    assert got == ask(models["hf"], **LENGTHS[name]) == ask(models["kvcompressed"], max_gen_toks=16)


def test_no_length_is_lm_evals_default(models, monkeypatch):
    monkeypatch.setattr(type(models["hf"]), "max_gen_toks", 12)
    for settings in ({}, {"max_gen_toks": None}, {"max_tokens": None, "max_new_tokens": None}):
        assert ask(models["kvcompressed"], **settings) == ask(models["hf"], max_gen_toks=12)


@pytest.mark.parametrize("settings", [{"method": "full"}, METHODS[0]], ids=["full", "snapkv"])
@pytest.mark.parametrize("name", LENGTHS)
def test_a_prompt_that_fits_with_its_answer_is_neither_refused_nor_cut(name, settings):
    room = len(load("hf").tok_encode(PROMPT)) + 16
    exact = load("kvcompressed", max_length=room, **settings)
    assert ask(exact, **LENGTHS[name]) == ask(load("kvcompressed", **settings), **LENGTHS[name])
    assert exact.compression_log.records[0].prompt_tokens == room - 16
    with pytest.raises(UserError, match="1 of 1 prompts are longer"):
        ask(load("kvcompressed", max_length=room - 1, **settings), **LENGTHS[name])


@pytest.mark.parametrize("name", LENGTHS)
def test_what_is_cut_is_what_lm_evals_model_cuts(name):
    args = {"max_length": 40}
    ours, stock = load("kvcompressed", method="full", overlong="truncate_left", **args), load("hf", **args)
    assert ask(ours, **LENGTHS[name]) == ask(stock, **LENGTHS[name])
    assert ours.compression_log.records[0].prompt_tokens == 24


def test_a_length_with_the_prompt_is_that_of_lm_evals_model(models):
    prompt = len(models["hf"].tok_encode(PROMPT))
    for most in (prompt + 5, str(prompt + 5), float(prompt + 5)):
        assert ask(models["kvcompressed"], max_length=most) == ask(models["hf"], max_length=prompt + 5)


def test_settings_that_look_alike_are_kept_apart(models):
    """lm-eval forms its batches by a key under which a text and its letters are one."""
    (free,) = ask(models["kvcompressed"], max_gen_toks=8)
    pairs = (free[i : i + 2] for i in range(1, len(free) - 1))
    one = next(pair for pair in pairs if free.index(pair) > min(map(free.index, pair)) > 0)  # a letter comes before it
    settings = [{"until": one}, {"until": [*one]}, {"until": [one]}, {"until": []}, {"until": None}]
    settings = [{**one, "max_gen_toks": 8} for one in settings]
    asks = [request("generate_until", PROMPT, one) for one in settings]
    got = models["kvcompressed"].generate_until(asks, disable_tqdm=True)
    assert got == [ask(models["kvcompressed"], **one)[0] for one in settings]
    assert got[0] == got[2] != got[3] == got[4] and got[1] not in (got[0], got[3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks=0 .*at least 1 token"),
        ({"max_tokens": -3}, "max_gen_toks=-3 .*at least 1 token"),
        ({"max_gen_toks": "many"}, "many.*in the generation settings of document 0 of t: invalid literal"),
        ({"max_gen_toks": 10**6}, "max_gen_toks=1000000 .*leaves no room for a prompt.*tokens for both"),
        ({"max_gen_toks": float("inf")}, "in the generation settings of document 0 of t"),
        ({"max_length": 20}, "max_length=20 .*counts the prompt.*Use max_gen_toks"),
        ({"max_length": 0}, "max_length=0 .*takes 1 to [0-9]+ .*Use max_gen_toks"),
        ({"max_length": -1}, "max_length=-1 .*takes 1 to [0-9]+ tokens for both"),
        ({"max_length": 10**6}, "max_length=1000000 .*takes 1 to [0-9]+ tokens for both"),
        ({"until": [{"a": 1}]}, "until={'a': 1} .*a stop is a text"),
        ({"max_new_token": 5}, "max_new_token=5 .*no such setting.*did you mean.*max_new_tokens"),
        ({"max_length": "long"}, "in the generation settings of document 0 of t: invalid literal"),
        ({"temperature": None}, "in the generation settings of document 0 of t: float"),
        ({"do_sample": True}, "do_sample=True with temperature=0 .*above 0"),
        ({"do_sample": True, "temperature": 0.7, "num_return_sequences": 2}, "num_return_sequences=2 .*repeats"),
        ({"num_return_sequences": "2", "num_beams": 2}, "num_return_sequences=2 .*one answer a request"),
        ({"use_cache": False}, "use_cache=False .*remove the setting"),
        ({"cache_implementation": "static"}, "cache_implementation=static"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message, models, monkeypatch):
    lm = models["kvcompressed"]
    monkeypatch.setattr(lm.model, "forward", None)
    with pytest.raises(UserError, match=message) as raised:
        ask(lm, **settings)
    assert "\n" not in str(raised.value)


def test_a_tuple_of_stops_is_a_list_of_them(models):
    (free,) = ask(models["kvcompressed"], max_gen_toks=8)
    stops = (free[3], "zzz")
    assert ask(models["kvcompressed"], until=stops, max_gen_toks=8) == [free.split(free[3])[0]]
    assert ask(models["kvcompressed"], until=list(stops), max_gen_toks=8) == [free.split(free[3])[0]]


def test_settings_that_are_no_settings_are_refused(models):
    with pytest.raises(UserError, match="must be names with values"):
        models["kvcompressed"].generate_until([request("generate_until", PROMPT, ["\n"])], disable_tqdm=True)


def test_one_sequence_and_one_beam_are_nothing_special(models):
    assert ask(models["kvcompressed"], max_gen_toks=6, num_return_sequences=1, num_beams=1) == ask(
        models["kvcompressed"], max_gen_toks=6
    )


def test_several_sequences_by_the_models_own_settings_are_refused_too():
    lm = load("kvcompressed", **METHODS[0])
    lm.model.generation_config.num_return_sequences = 3
    with pytest.raises(UserError, match="num_return_sequences=3"):
        ask(lm, max_gen_toks=4)


@pytest.mark.parametrize("more", [{}, {"prefill_chunk": 16}], ids=["whole", "chunks"])
def test_beams_by_the_models_own_settings_are_beams(more):
    asked, own = (load("kvcompressed", **METHODS[0], **more) for _ in range(2))
    own.model.generation_config.num_beams = 3
    assert ask(own, max_gen_toks=8) == ask(asked, max_gen_toks=8, num_beams=3)


@pytest.mark.parametrize("think", [4, "harbour", "is"])
def test_what_was_thought_is_left_out_as_in_lm_evals_model(think):
    settings = {"max_gen_toks": 24, "until": ["\n\n"]}
    ours, stock = load("kvcompressed", method="full", think_end_token=think), load("hf", think_end_token=think)
    for text in (STORY, STORY * 2 + "The special", "The boats"):
        assert ask(ours, text, **settings) == ask(stock, text, **settings)


def test_several_groups_of_settings_and_sampling_draw_what_lm_evals_model_draws():
    import torch

    sampled = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.9}
    settings = [sampled, {"until": ["\n"], "max_gen_toks": 5}, {**sampled, "top_k": 20}, sampled]
    answers = []
    for lm in (load("kvcompressed", method="full", batch_size=2), load("hf", batch_size=2)):
        torch.manual_seed(11)
        texts = [STORY, STORY * 2, "The boats lay", STORY + "The gulls"]
        asks = [request("generate_until", t, s) for t, s in zip(texts, settings, strict=True)]
        answers.append(lm.generate_until(asks, disable_tqdm=True))
    assert answers[0] == answers[1]


def test_prompts_of_one_length_are_run_in_the_order_of_their_texts_as_in_lm_eval():
    """Sampled answers depend on it; a question that comes after the compression brings its context's together."""
    texts, ids = ["b", "c", "a", "longer"], [[3, 1], [1, 2], [2, 9], [1, 1, 1]]
    run = SimpleNamespace(requests=[SimpleNamespace(args=(text,)) for text in texts], alone=lambda tokens: False)
    settings = SimpleNamespace(key="", beams=1, looks_at_prompt=False, max_length=9)

    def order(boundaries):
        prompts = [Prompt(i, row, settings, b) for i, (row, b) in enumerate(zip(ids, boundaries, strict=True))]
        return [p.i for batch in generation._batches(run, prompts, 1) for p in batch]

    assert [texts[i] for i in order([None] * 4)] == ["longer", "a", "b", "c"]
    assert [texts[i] for i in order([Boundary(1, False)] * 4)] == ["longer", "c", "a", "b"], "by head: 1, 2, 3"
