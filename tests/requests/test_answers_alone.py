"""An answer is the one that its prompt has alone, whatever shares its batch: stops of every kind, and every setting."""

from __future__ import annotations

import functools
import random

import pytest
import tiny as tiny_models
import torch
import transformers
from lm_eval.api.registry import get_model
from model.test_requests import STORY, load, request
from tokenizers.processors import TemplateProcessing

from kv_lm_eval import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = {
    "full": {"method": "full"},
    "no_cache": {"method": "no_cache"},
    "snapkv": {"method": "snapkv", "max_capacity_prompt": 24, "window_size": 8, "compress_every": 3},
}
NEW = 10
SPECIAL = range(40, 900)


def model() -> transformers.PreTrainedModel:
    """Random, in float64, with kv-tiny's vocabulary: its answers are words in any order, never twice the same."""
    built = tiny_models.build("llama", vocab_size=2048, seed=3).double()
    built.generation_config = transformers.GenerationConfig(eos_token_id=1, bos_token_id=0, pad_token_id=2)
    return built


def lm(name: str, batch_size: int, **more):
    """A model that has many special tokens, so that many an answer holds some."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
    special = [transformers.AddedToken(t, special=True) for t in tokenizer.convert_ids_to_tokens(SPECIAL)]
    tokenizer.add_tokens(special, special_tokens=True)
    args = METHODS[name] if name != "hf" else {}
    cls = get_model("hf" if name == "hf" else "kvcompressed")
    loaded = functools.partial(cls, pretrained=model(), tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    return loaded(**args, **more, **({"max_length": 400} if name == "hf" else {}))


def prompts(seed: int) -> list[str]:
    words = STORY.split()
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=k)) for k in (30, 9, 21, 14, 9)]


def ask(lm, texts: list[str], settings: dict) -> list[str]:
    return lm.generate_until([request("generate_until", text, settings) for text in texts], disable_tqdm=True)


@functools.cache
def stops(*texts: str) -> dict[str, dict]:
    """Settings whose stops occur in these prompts' own answers, each at another step."""
    free = {"until": [], "max_gen_toks": NEW}
    tokens, stock, lm = [], model(), load("hf")
    for text in texts:
        ids = torch.tensor([lm.tok_encode(text)])
        out = stock.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=2)
        tokens.append(out[0, ids.shape[1] :].tolist())
    words = [lm.tok_decode(row, skip_special_tokens=False) for row in tokens]
    special = [lm.tok_decode([t], skip_special_tokens=False) for row in tokens for t in row if t in SPECIAL]
    assert len(special) > 5 and len(set(words)) == len(texts)
    return {
        "none": free,
        "special tokens": {**free, "until": special[:3]},
        "several tokens": {**free, "until": [words[0][8:16], words[1][4:15]]},
        "inside a token": {**free, "until": [words[0][1:3], words[2][5:6], words[3][7:9]]},
        "empty text": {**free, "until": ["", words[0][4:6]]},
        "one token": {**free, "until": [], "eos_token_id": tokens[0][4]},
        "a list of tokens": {**free, "until": [words[1][9:11]], "eos_token_id": [tokens[0][3], tokens[1][6], 1]},
        "a shortest answer": {**free, "min_new_tokens": 4, "eos_token_id": [tokens[0][1], tokens[2][5]]},
        "repeats penalised": {**free, "repetition_penalty": 1.7},
        "no repeated pair": {**free, "no_repeat_ngram_size": 2},
        "lengths with the prompt": {**free, "max_length": 118, "min_length": 113, "eos_token_id": [tokens[0][1]]},
        "beams": {**free, "num_beams": 2, "until": [words[0][4:6]]},
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_composition_gives_the_answers_of_prompts_alone(name):
    texts = prompts(0)
    single, batch = lm(name, 1), lm(name, 4)
    differ = set()
    for kind, settings in stops(*texts).items():
        alone = [ask(single, [text], settings)[0] for text in texts]
        for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1]):
            assert ask(batch, [texts[i] for i in order], settings) == [alone[i] for i in order], kind
        differ.add(tuple(alone))
    assert len(differ) > 6, "the stops took effect"


def test_without_compression_an_answer_is_that_of_lm_evals_model_for_the_prompt_alone():
    texts = prompts(0)
    known, stock, batch = stops(*texts), lm("hf", 1), lm("full", 4)
    expected = {kind: [ask(stock, [text], settings)[0] for text in texts] for kind, settings in known.items()}
    assert {kind: ask(batch, texts, settings) for kind, settings in known.items()} == expected


def test_a_text_that_begins_with_bos_does_not_take_it_from_its_neighbours():
    """lm-eval asks the first text of a batch whether all have one."""
    answers = {}
    for size in (1, 2):
        one = load("kvcompressed", method="full", batch_size=size)
        bos = one.tokenizer.bos_token = one.tokenizer.convert_ids_to_tokens(0)
        one.tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
        texts = [bos + STORY * 2 + "The", STORY + "The number is"]
        answers[size] = ask(one, texts, {"until": [], "max_gen_toks": 12})
        assert [r.prompt_tokens for r in one.compression_log.records] == [len(one.tok_encode(t)) for t in texts]
    assert answers[1] == answers[2]


@pytest.mark.parametrize("name", ["full", "snapkv"])
def test_rows_whose_length_turns_all_of_their_tokens_share_no_batch(name):
    """Dynamic frequencies: beyond 64 tokens a sequence is rotated by its length."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    answers = []
    for size in (1, 4):
        turning = tiny_models.build("llama", vocab_size=2048, max_position_embeddings=64, rope_parameters=rope).double()
        turning.generation_config = transformers.GenerationConfig(eos_token_id=1, bos_token_id=0, pad_token_id=2)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
        one = get_model("kvcompressed")(
            pretrained=turning, tokenizer=tokenizer, batch_size=size, max_length=300, device="cpu", **METHODS[name]
        )
        texts = [(STORY * 4)[:n] for n in (600, 90, 420, 120, 235)]
        kinds = ask(one, texts, {"until": [], "max_gen_toks": 8})
        asked = [request("loglikelihood", text, c) for text in texts for c in (" 48213", " 9")]
        scores = [s for s, _ in one.loglikelihood(asked, disable_tqdm=True)]
        documents = one.loglikelihood_rolling([request("loglikelihood_rolling", t) for t in texts], disable_tqdm=True)
        answers.append((kinds, scores, list(map(float, documents))))
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] == pytest.approx(answers[1][1], abs=1e-9)
    assert answers[0][2] == pytest.approx(answers[1][2], abs=1e-4)
