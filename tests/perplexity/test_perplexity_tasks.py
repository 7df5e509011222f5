"""The tasks through lm-eval: what is counted, what is named, and what other models are told."""

from __future__ import annotations

import json
import math
import re

import pytest

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.tasks.perplexity import texts

pytestmark = pytest.mark.filterwarnings("ignore")
RAW = "\r\n  It was a quiet day; the boats lay still.\r\n\r\nNobody came — “nobody”, he said.  The end. 日本語\r\n" * 4
BOOK = RAW.replace("\r\n", "\n")  # as it is read
WIKI = (
    " \n = First <unk> = \n \n One line , with @-@ marks . \n = = Part = = \n More . \n \n = Second = \n \n Last . \n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    def evaluate(task, model="kvcompressed", metadata=None, **model_args):
        pretrained = "kv-tiny" if model == "kvcompressed" else tiny.path()
        model_args = {"pretrained": pretrained, "dtype": "float32", **model_args}
        use_cache = (metadata or {}).pop("use_cache", None)
        with plugin.only_our_tasks():
            index = TaskManager(metadata={**model_args, **(metadata or {})})
        return lm_eval.simple_evaluate(
            model=model, model_args=model_args, tasks=[task], task_manager=index, device="cpu", batch_size=1,
            bootstrap_iters=0, use_cache=use_cache,
        )  # fmt: skip

    return evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("texts")
    (where / "10.txt").write_bytes(b"\xef\xbb\xbf" + RAW.encode())
    (where / "9.txt").write_bytes(BOOK[:90].encode())
    (where / "wiki.test.raw").write_text(WIKI, encoding="utf-8", newline="")
    return where


def scores(results, task):
    return {k.split(",")[0]: v for k, v in results["results"][task].items() if "stderr" not in k and "," in k}


STREAMING = {"method": "streaming_llm", "n_sink": 2, "window_size": 30, "compress_every": 4}


def test_every_metric_is_a_quotient_of_sums_over_all_tokens(run, folder):
    results = run("kv_ppl_file", metadata={"text_files": str(folder)}, **STREAMING)
    samples = results["samples"]["kv_ppl_file"]
    got = scores(results, "kv_ppl_file")
    nll = [x for s in samples for x in s["doc"]["per_token"]["nll"]]
    late = [
        x
        for s in samples
        for t, x in enumerate(s["doc"]["per_token"]["nll"])
        if (s["doc"]["per_token"]["first_eviction"] or math.inf) <= t
    ]
    words = sum(len(re.split(r"\s+", text)) for text in (BOOK, BOOK[:90]))
    size = len(BOOK.encode()) + len(BOOK[:90].encode())
    assert 0 < len(late) < len(nll)
    assert got["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert got["ppl_after_first_eviction"] == pytest.approx(math.exp(sum(late) / len(late)), rel=1e-5)
    assert got["word_perplexity"] == pytest.approx(math.exp(sum(nll) / words), rel=1e-5)
    assert got["byte_perplexity"] == pytest.approx(math.exp(sum(nll) / size), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(sum(nll) / size / math.log(2), rel=1e-5)
    assert 0 <= got["next_token_accuracy"] <= 1
    assert (got["scored_tokens"], got["documents"]) == (len(nll), 2)
    assert results["configs"]["kv_ppl_file"]["metadata"]["perplexity"]["protocol"] == "streaming"
    json.dumps(samples)


def test_with_a_limit_words_and_bytes_are_those_of_the_text_that_was_scored(run, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    results = run(
        "kv_ppl_file", metadata={"text_files": [str(folder / "10.txt")], "max_eval_tokens": 37}, method="full"
    )
    (sample,) = results["samples"]["kv_ppl_file"]
    part = tokenizer.decode(sample["doc"]["per_token"]["tokens"], clean_up_tokenization_spaces=False)
    assert BOOK.startswith(part) and len(sample["doc"]["per_token"]["tokens"]) == 37
    assert sample["word_perplexity"][1] == len(re.split(r"\s+", part))
    assert sample["byte_perplexity"][1] == len(part.encode())


def test_rolling_is_lm_evals_number_under_both_models_and_other_protocols_stop_early(run, folder):
    rolling = {"text_files": str(folder), "protocol": "rolling", "max_eval_tokens": None}
    ours = scores(run("kv_ppl_file", metadata=dict(rolling), method="full"), "kv_ppl_file")
    theirs = scores(run("kv_ppl_file", model="hf", metadata=dict(rolling)), "kv_ppl_file")
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte", "documents"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    assert "perplexity" not in theirs  # lm-eval's model tells no number of tokens
    for metadata in ({"text_files": str(folder)}, {**rolling, "max_eval_tokens": 20}):
        with pytest.raises(UserError, match="needs --model kvcompressed"):
            run("kv_ppl_file", model="hf", metadata=metadata)


def test_an_answer_under_another_protocol_is_never_taken(run, folder):
    with pytest.raises(UserError, match="under another name"):
        run("kv_ppl_file", metadata={"text_files": str(folder), "protocol": "rolling"}, **STREAMING)
    from lm_eval.api.registry import get_model

    lm = get_model("kvcompressed").create_from_arg_obj({"pretrained": "kv-tiny", "device": "cpu", **STREAMING})
    import lm_eval
    from lm_eval.tasks import TaskManager

    with plugin.only_our_tasks():  # a model object: the task cannot know which method it has
        index = TaskManager(metadata={"text_files": str(folder), "protocol": "rolling"})
    with pytest.raises(UserError, match="streaming was run"):
        lm_eval.simple_evaluate(model=lm, tasks=["kv_ppl_file"], task_manager=index, bootstrap_iters=0)


def test_the_request_cache_tells_protocols_and_limits_apart(run, folder, tmp_path):
    def ask(**metadata):
        metadata = {"text_files": str(folder / "10.txt"), "use_cache": str(tmp_path / "answers"), **metadata}
        results = run("kv_ppl_file", metadata=metadata, **STREAMING)
        return scores(results, "kv_ppl_file"), results["config"]["kv_stats"]["requests"]

    first, asked = ask()
    assert asked == 1
    assert ask() == (first, 0)
    for other in ({"max_eval_tokens": 60}, {"protocol": "prefill_then_stream", "prefill_tokens": 60}):
        changed, asked = ask(**other)
        assert asked == 1 and changed["perplexity"] != first["perplexity"]


def test_a_strided_run_has_no_words_or_bytes_because_its_first_token_is_not_scored(run, folder):
    results = run(
        "kv_ppl_file", metadata={"text_files": str(folder), "protocol": "strided", "strided_length": 32}, method="full"
    )
    got = scores(results, "kv_ppl_file")
    assert "word_perplexity" not in got and got["perplexity"] > 1
    lengths = [len(s["doc"]["per_token"]["tokens"]) for s in results["samples"]["kv_ppl_file"]]
    assert got["scored_tokens"] == sum(lengths) - len(lengths)
    assert results["samples"]["kv_ppl_file"][0]["doc"]["per_token"]["reading"]["stride"] == 16


def test_local_wikitext_has_the_documents_and_the_counts_of_lm_evals_own_task(run, folder):
    from lm_eval.tasks.wikitext import preprocess_wikitext as theirs

    first, second = texts.wikitext("wikitext-2-raw-v1", str(folder), joined=False)
    page = " = First <unk> = \n \n One line , with @-@ marks . \n = = Part = = \n More . \n "
    counted = theirs.process_results({"page": page}, [-5.0])
    assert (first["words"], first["bytes"]) == (counted["word_perplexity"][1], counted["bits_per_byte"][1])
    assert first["text"] == theirs.wikitext_detokenizer({"page": page})
    assert second["text"].startswith(" = Second =")
    results = run("kv_ppl_wikitext", metadata={"wikitext_dir": str(folder), "protocol": "rolling"}, method="full")
    assert scores(results, "kv_ppl_wikitext")["documents"] == 2
    (joined,) = texts.wikitext("wikitext-2-raw-v1", str(folder), joined=True)
    assert joined["text"].startswith("\n\n = First <unk> = \n\n\n\n\n One line , with @-@ marks . \n\n\n = = Part")
    results = run("kv_ppl_wikitext_joined", metadata={"wikitext_dir": str(folder)}, method="full")
    assert scores(results, "kv_ppl_wikitext_joined")["documents"] == 1


def test_local_books_come_in_the_order_of_their_numbers(run, folder):
    assert [row["name"] for row in texts.pg19(str(folder), 5)] == ["9", "10"]
    results = run("kv_ppl_pg19", metadata={"pg19_dir": str(folder), "max_eval_tokens": 20}, method="full")
    assert scores(results, "kv_ppl_pg19")["scored_tokens"] == 20


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "text_files"),
        ({"text_files": ["nowhere.txt"]}, "is not a file"),
        ({"text_file": "a.txt"}, "did you mean 'text_files'"),
        ({"max_eval_token": 5}, "did you mean 'max_eval_tokens'"),
    ],
)
def test_mistakes_are_told(run, metadata, message):
    with pytest.raises(UserError, match=message):
        run("kv_ppl_file", metadata=metadata, method="full")


def test_files_that_are_no_text_are_told(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    for name, message in (("latin.txt", "not UTF-8"), ("empty", r"no \*.txt"), ("blank.txt", "is empty")):
        with pytest.raises(UserError, match=message):
            texts.files(str(tmp_path / name))
