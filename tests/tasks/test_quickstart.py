"""The quick-start documents: the same everywhere, as long and as deep as they say, answerable only from the text."""

import hashlib

import pytest
from tokenizers import Tokenizer

from kv_lm_eval import tiny
from kv_lm_eval.tasks.quickstart import docs
from kv_lm_eval.tiny import episodes


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{tiny.path()}/tokenizer.json")


@pytest.mark.parametrize("build", [docs.needle, docs.choice, docs.ppl])
def test_documents_do_not_depend_on_the_model_arguments(build):
    assert build()["test"].to_list() == build(pretrained="other", method="window", n_sink=4)["test"].to_list()


def test_episodes_are_the_same_in_every_python_version():
    """Only random.Random.random() is drawn from, whose sequence Python promises to keep."""
    draw = episodes.Draw(7)
    sentences = episodes.take(episodes.grammar_sentences(draw), 100, len)
    assert sentences == ["A simple doctor sat near the library because the small baker walked every week."]
    assert episodes.needles(draw, 1)[0].statement == "The special magic number for pepper is 12643."


def test_needle_prompts_have_the_length_and_depth_they_state():
    rows = docs.needle()["test"].to_list()
    cells = {(row["context_length"], row["document_depth_percent"]) for row in rows}
    assert len(cells) == len(docs.NEEDLE_LENGTHS) * len(docs.NEEDLE_DEPTHS)
    assert len(rows) == 30
    for row in rows:
        assert row["context_length"] - 30 < docs.count_tokens(row["prompt"]) <= row["context_length"]
        assert row["depth"] == pytest.approx(row["document_depth_percent"] / 100, abs=0.07)
        statement = episodes.MAGIC.statement.format(key=row["key"], value=row["value"])
        where = row["prompt"].index(statement) / row["prompt"].index("\n\nQuestion:")
        assert where == pytest.approx(row["depth"], abs=0.2)
        assert row["prompt"].count(row["value"]) == 1


def test_choices_all_occur_in_the_text_and_differ_at_the_first_token(tokenizer):
    rows = docs.choice()["test"].to_list()
    assert len(rows) == 24
    for row in rows:
        ids = [tokenizer.encode(" " + choice).ids for choice in row["choices"]]
        assert len({choice_ids[0] for choice_ids in ids}) == 4
        assert {len(choice_ids) for choice_ids in ids} == {5}
        assert all(row["prompt"].count(f"is {choice}.") == 1 for choice in row["choices"])
        assert f"for {row['key']} is {row['choices'][row['label']]}." in row["prompt"]
        assert 384 <= docs.count_tokens(row["prompt"]) <= 512


def test_right_choices_are_spread_over_the_four_places():
    labels = docs.choice()["test"]["label"]
    assert max(labels.count(place) for place in range(4)) <= 10


def test_perplexity_texts_are_ours_and_the_same_in_every_python_version():
    found = {row["name"]: row for row in docs.ppl()["test"].to_list()}
    assert {name: row["sha256"][:16] for name, row in found.items()} == {
        "ferry": "599bad0540d942b6",
        "memory": "78745ec4dbe3357a",
    }
    for row in found.values():
        assert hashlib.sha256(row["page"].encode()).hexdigest() == row["sha256"]
        assert 1900 < docs.count_tokens(row["page"]) < 2000 and row["page"].isascii()


def test_perplexity_counts_utf8_bytes():
    assert docs.process_ppl({"page": "two é"}, [-3.0]) == {"bits_per_byte": (-3.0, 6), "byte_perplexity": (-3.0, 6)}
