"""The prompts are the official ones, byte for byte, and are cut as the official ones."""

import hashlib
import json

import pytest
from longbench.golden import OFFICIAL, OWN, needs_official, read_jsonl

from kv_lm_eval.tasks.longbench_tasks.specs import official, official_e
from kv_lm_eval.tasks.longbench_tasks.truncation import truncate_middle


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_templates_are_byte_exact():
    expected = json.loads((OWN / "prompt_sha256.json").read_text())
    assert {name: sha256(spec.prompt) for name, spec in official().items()} == expected


@needs_official
def test_templates_equal_the_official_file():
    expected = json.loads((OFFICIAL / "template_sha256.json").read_text())
    found = {name: {"sha256": sha256(s.prompt), "chars": len(s.prompt)} for name, s in official().items()}
    assert found == expected


def test_there_are_21_datasets_and_13_of_longbench_e():
    assert len(official()) == 21
    assert len(official_e()) == 13
    assert sum(spec.language == "zh" for spec in official().values()) == 5
    no_template = {name for name, spec in official().items() if not spec.chat_template}
    assert no_template == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {n for n, s in official().items() if s.first_line_only} == {"trec", "triviaqa", "samsum", "lsht"}


@pytest.fixture(scope="module")
def toy_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(OFFICIAL / "toy_tokenizer")


@needs_official
def test_whole_prompts_and_their_truncation_equal_the_official_ones(toy_tokenizer):
    """Real rows through template and truncation to three lengths: texts, token counts, lost characters."""
    rows = {}
    for file in OFFICIAL.glob("rows/*.jsonl"):
        for row in read_jsonl(file):
            rows[row["dataset"], row["_id"]] = row
    cases = read_jsonl(OFFICIAL / "golden_prompts.jsonl")
    assert len(cases) == 48
    for case in cases:
        spec = official()[case["dataset"]]
        prompt = spec.prompt.format(**rows[case["row_dataset"], case["_id"]])
        assert sha256(prompt) == case["prompt_sha256"]
        assert prompt.endswith(case["tail"])
        assert spec.max_gen_toks == case["max_gen"]
        for length, expected in case["trunc"].items():
            fitted = truncate_middle(prompt, toy_tokenizer, int(length))
            assert sha256(fitted.text) == expected["sha256"]
            assert fitted.truncated == expected["truncated"]
            assert fitted.tokens_before == expected["n_tokens"]
            assert fitted.tokens_after == expected["retokenized_len"]
            assert ("\ufffd" in fitted.text) == expected["has_replacement_char"]


class Words:
    """A word is a token, and <s> comes first: cuts can be read off the text."""

    def __call__(self, text, **_):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=["<s>", *text.split()])

    def decode(self, ids, skip_special_tokens):
        return " ".join(i for i in ids if not (skip_special_tokens and i == "<s>"))


def test_bos_counts_in_the_first_half_and_the_halves_are_joined_without_a_space():
    fitted = truncate_middle("a b c d e f g", Words(), 5)
    assert fitted.text == "af g"
    assert (fitted.truncated, fitted.tokens_before, fitted.tokens_after) == (True, 8, 3)


def test_a_prompt_that_fits_is_untouched():
    fitted = truncate_middle("  a  b ", Words(), 3)
    assert fitted.text == "  a  b "
    assert not fitted.truncated
