"""Text that spells the end-of-text: a stop string as in lm-eval, but not in LongBench, where a token ends answers."""

from __future__ import annotations

import json

import lm_eval
import pytest
import tiny as tiny_models
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from model.test_requests import STORY, load

from kv_lm_eval import plugin, tiny

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = STORY * 2 + "The special magic number for harbour is"
TOKEN_ONLY = {"eos_text_is_no_stop": True}


def with_end(text: str, name: str = "kvcompressed", **args):
    """The embedded model, whose end-of-text is spelt as a part of its answer is."""
    lm = load(name, **args)
    lm.tokenizer.add_special_tokens({"eos_token": text})
    return lm


def ask(lm, doc: dict, n: int = 1, **settings) -> list[str]:
    settings = {"until": [], "max_gen_toks": 8, **settings}
    return lm.generate_until([Instance("generate_until", doc, (PROMPT, settings), 0) for _ in range(n)], True)


@pytest.fixture(scope="module")
def answer() -> str:
    (text,) = ask(load("kvcompressed", method="full"), {})
    assert "221" in text
    return text


@pytest.mark.parametrize("settings", [{"method": "full"}, {"method": "no_cache"}], ids=lambda s: s["method"])
@pytest.mark.parametrize("size", [1, 3])
def test_ordinary_tokens_that_spell_the_end_stop_as_in_lm_eval_unless_only_the_token_does(settings, size, answer):
    lm = with_end("221", batch_size=size, **settings)
    cut = answer[: answer.index("221")]
    assert ask(lm, {}, size) == [cut] * size == ask(with_end("221", "hf"), {}) * size
    assert ask(lm, TOKEN_ONLY, size) == [answer] * size
    both = [Instance("generate_until", doc, (PROMPT, {"until": [], "max_gen_toks": 8}), 0) for doc in ({}, TOKEN_ONLY)]
    assert lm.generate_until(both, disable_tqdm=True) == [cut, answer]


@pytest.mark.parametrize("size", [1, 3])
def test_the_token_ends_it_even_where_the_model_does_not_know_it(size, answer):
    lm = load("kvcompressed", method="full", batch_size=size)
    third = lm.tok_encode(answer, add_special_tokens=False)[2]
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(third)
    assert lm.model.generation_config.eos_token_id == 1
    (short,) = set(ask(lm, TOKEN_ONLY, size))
    assert len(short) < len(answer) and answer[len(short) :].startswith(lm.tokenizer.eos_token.replace("Ġ", " "))
    assert lm.compression_log.records[0].timing.new_tokens < 8


@pytest.mark.parametrize("name", ["lcc", "hotpotqa", "samsum"])
def test_longbench_keeps_an_answer_that_spells_the_end_of_text(name, tmp_path):
    row = {"input": "The number is 4", "context": PROMPT, "answers": ["x"], "length": 9, "dataset": name}
    row |= {"language": "en", "all_classes": None, "_id": "0"}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with plugin.only_our_tasks():
        manager = TaskManager(metadata={"longbench_dir": str(tmp_path), "longbench_max_length": "none"})

    def sample(end: str) -> dict:
        model = tiny_models.build("llama", vocab_size=2048, max_position_embeddings=2048)  # says any word
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
        tokenizer.add_special_tokens({"eos_token": end})
        lm = get_model("kvcompressed")(pretrained=model, tokenizer=tokenizer, method="full")
        got = lm_eval.simple_evaluate(
            model=lm,
            tasks=[f"kv_longbench_{name}"],
            task_manager=manager,
            bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": 8},
        )
        (one,) = got["samples"][f"kv_longbench_{name}"]
        assert "eos_text_is_no_stop" not in one["doc"]
        return one

    first = sample("<|never|>")
    text, prompt = first["resps"][0][0], first["arguments"][0][0]
    parts = (text[i : i + n] for n in (9, 6, 4) for i in range(len(text) - n + 1))
    end = next(part for part in parts if part not in prompt)
    assert sample(end)["resps"] == first["resps"]
