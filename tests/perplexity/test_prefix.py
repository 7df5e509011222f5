"""A document begins with its prefix token once, for every tokenizer, setting, method and protocol of ours."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tokenizers.processors import TemplateProcessing

from kv_lm_eval import plugin, tiny
from kv_lm_eval.requests.rows import document_row, prefix_of, text_tokens

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = (
    "The harbour was quiet that morning, and the boats lay still. Nobody had seen the ferry since the storm. “Ça va?”"
)
METHODS = {
    "full": {"method": "full"},
    "streaming_llm": {"method": "streaming_llm", "n_sink": 2, "window_size": 14, "compress_every": 1},
    "h2o": {"method": "h2o", "max_capacity_prompt": 16, "compress_every": 4},
    "window_recompute": {"method": "window_recompute", "n_sink": 0, "window_size": 16},
}
# What a tokenizer puts around a text by itself; kv-tiny's own puts nothing there.
HABITS = {"nothing": None, "bos": "<s> $A", "bos_and_eos": "<s> $A </s>", "eos": "$A </s>", "two": "<pad> <s> $A"}


@pytest.fixture(scope="module")
def model_with(tmp_path_factory):
    """kv-tiny's folder, with a tokenizer of one habit."""

    def make(habit: str, bos: bool = True) -> str:
        folder = tmp_path_factory.getbasetemp() / f"{habit}-{bos}"
        if not folder.exists():
            shutil.copytree(tiny.path(), folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
            if HABITS[habit]:
                special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>", "<pad>")]
                processor = TemplateProcessing(single=HABITS[habit], special_tokens=special)
                tokenizer.backend_tokenizer.post_processor = processor
            if not bos:
                tokenizer.bos_token = None
            tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def load(path: str, model: str = "kvcompressed", **args):
    return get_model(model).create_from_arg_obj(
        {"pretrained": path, "dtype": "float32", "device": "cpu", "batch_size": 1, **args}
    )


def ask(model, text, **reading):
    arguments = (text, reading) if reading else (text,)
    request = Instance("loglikelihood_rolling", {}, arguments, 0, ("t", 0, 1))
    return model.loglikelihood_rolling([request], disable_tqdm=True)[0]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_tokenizer_adds_changes_no_number_of_our_protocols(model_with, method, bos):
    found = {}
    for habit, setting in itertools.product(HABITS, (None, True, False)):
        if setting is not None and habit not in ("nothing", "bos"):
            continue
        given = {} if setting is None else {"add_bos_token": setting}
        lm = load(model_with(habit, bos), **METHODS[method], **given)
        readings = [{"protocol": "streaming"}]
        if method in ("streaming_llm", "h2o"):
            readings.append({"protocol": "prefill_then_stream", "prefill_tokens": 12})
        for reading in readings:
            for limit in ({}, {"max_eval_tokens": 9}):
                score = ask(lm, TEXT, **reading, **limit)
                record = score.record
                key = (reading["protocol"], bool(limit))
                here = (record.tokens.tolist(), record.start, record.end, record.slots is None)
                first = found.setdefault(key, (here, score))
                assert here == first[0], (habit, setting, key)
                assert score == pytest.approx(first[1], abs=1e-4), (habit, setting, key)
                assert record.tokens[0] != lm.prefix_token_id


@torch.inference_mode()
def test_each_token_is_predicted_from_one_prefix_and_the_text_alone(model_with):
    lm = load(model_with("bos"), method="full")
    row = [lm.tokenizer.bos_token_id, *lm.tokenizer.encode(TEXT, add_special_tokens=False)]
    logits = transformers.AutoModelForCausalLM.from_pretrained(tiny.path()).float()(torch.tensor([row])).logits
    expected = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    assert ask(lm, TEXT, protocol="streaming").record.log_probs.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("habit", HABITS)
def test_a_text_that_spells_the_prefix_has_it_once_and_counts_the_rest(model_with, habit):
    lm = load(model_with(habit), **METHODS["streaming_llm"])
    plain, spelled = (ask(lm, text, protocol="streaming") for text in (TEXT, "<s>" + TEXT))
    assert spelled.record.tokens.tolist() == plain.record.tokens.tolist() and spelled == pytest.approx(plain, abs=1e-4)
    assert (plain.record.start, plain.record.end) == (0, len(TEXT))
    assert (spelled.record.start, spelled.record.end) == (3, 3 + len(TEXT))
    (limited,) = [ask(lm, "<s>" + TEXT, protocol="streaming", max_eval_tokens=7)]
    assert len(limited.record.tokens) == 7 and TEXT.startswith(("<s>" + TEXT)[3 : limited.record.end])


@torch.inference_mode()
@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize(("length", "stride"), [(16, 8), (16, 16), (4000, 512)])
def test_strided_windows_begin_as_the_tokenizer_begins_a_text_and_score_the_text_alone(
    model_with, habit, length, stride
):
    lm = load(model_with(habit), method="full")
    score = ask(lm, TEXT, protocol="strided", strided_length=length, stride=stride)
    ids = lm.tokenizer(TEXT, add_special_tokens=False).input_ids
    before = {"nothing": [], "eos": [], "two": [2, 0]}.get(habit, [0])
    row = [*before, *ids]
    model, nll, done = transformers.AutoModelForCausalLM.from_pretrained(tiny.path()).float(), {}, 0
    for begin in range(0, len(row), stride):
        end = min(begin + length, len(row))
        logits = model(torch.tensor([row[begin:end]])).logits[0].log_softmax(-1)
        for place in range(max(done, begin + 1, len(before)), end):
            nll[place - len(before)] = -logits[place - begin - 1, row[place]].item()
        done = end
        if end == len(row):
            break
    assert score.record.tokens.tolist() == ids
    assert {i: -x for i, x in enumerate(score.record.log_probs.tolist()) if x == x} == pytest.approx(nll, abs=1e-4)


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("setting", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_lm_evals_own_rolling_is_that_of_hf_and_says_a_double_bos_once(model_with, habit, setting, caplog):
    path = model_with(habit)
    theirs = load(path, "hf", **setting)
    expected = ask(theirs, TEXT)
    twice = theirs.tok_encode(TEXT)[0] == theirs.prefix_token_id
    full, lossy = load(path, method="full", **setting), load(path, **METHODS["streaming_llm"], **setting)
    for model, reading in ((full, {}), (full, {"protocol": "rolling"}), (lossy, {})):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            score = ask(model, TEXT, **reading)
        if model is full:
            assert score == pytest.approx(expected, rel=1e-5)
        assert score.record.tokens.tolist() == theirs.tok_encode(TEXT)  # the others read what `full` reads
        said = [r.getMessage() for r in caplog.records if "twice" in r.getMessage()]
        assert len(said) == int(twice), said
        assert all("1 of 1 documents begin with '<s>' twice" in text for text in said)


def test_words_and_bytes_are_those_of_the_scored_text_where_it_spells_the_prefix(model_with, tmp_path):
    from kv_lm_eval.tasks.perplexity.task import PerplexityTask

    (tmp_path / "a.txt").write_text("<s>" + TEXT, encoding="utf-8")
    metadata = {"text_files": str(tmp_path / "a.txt"), "method": "full"}
    config = {"task": "kv_ppl_file", "output_type": "loglikelihood_rolling", "test_split": "test"}
    task = PerplexityTask({**config, "perplexity": {"source": "files"}, "metadata": metadata})
    (doc,) = task.eval_docs
    score = ask(load(model_with("bos"), method="full"), doc["text"], **task.reading.options())
    found = task.process_results(doc, [score])
    assert found["bits_per_byte"][1] == len(TEXT.encode()) and found["word_perplexity"][1] == len(TEXT.split())


@pytest.mark.parametrize("habit", HABITS)
def test_scripts_build_the_same_row(model_with, habit):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_with(habit))
    row = document_row(tokenizer, TEXT)
    assert row == document_row(tokenizer, "<s>" + TEXT) == [0, *row[1:]] and row.count(0) == 1
    without = transformers.AutoTokenizer.from_pretrained(model_with(habit, bos=False))
    assert prefix_of(without) == without.eos_token_id and document_row(without, TEXT) == [1, *row[1:]]
    assert text_tokens(tokenizer, TEXT, prefix=5) == (row[1:], 0)


GEMMA = Path(os.environ.get("KV_LM_EVAL_REAL", "/work/real")) / "gemma270-hf"


@pytest.mark.slow
@pytest.mark.skipif(not GEMMA.is_dir(), reason=f"the real model is not here: {GEMMA}")
def test_gemmas_own_bos_stands_once():
    """lm-eval's model has it once where it is told to add none of its own."""
    lm, stock = load(str(GEMMA), method="full"), load(str(GEMMA), "hf", add_bos_token=False)
    score = ask(lm, TEXT, protocol="streaming")
    assert score.record.tokens.tolist() == lm.tokenizer(TEXT).input_ids[1:]
    assert score == pytest.approx(ask(stock, TEXT), abs=1e-2)
