"""What is known of a request hangs on the request: tasks that ask the same words never share or lose anything."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from model.test_requests import STORY, choices, load, request

from kv_lm_eval import plugin
from kv_lm_eval.requests.document_scores import DocumentScore
from kv_lm_eval.requests.samples import Choice, Text

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
SNAPKV = {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8}
ARGS = {"pretrained": "kv-tiny", "dtype": "float32", **SNAPKV}

GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}} Who saw the ferry? The special magic number for harbour is"
doc_to_target: "x"
repeats: {repeats}
generation_kwargs: {{until: {until}, max_gen_toks: {tokens}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} Who saw the ferry? The special magic number for harbour is"
doc_to_choice: ["48213", "9", "51"]
doc_to_target: 0
metric_list: [{metrics}]
"""
ACC = "{metric: acc}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    """Tasks with the same prompts and different questions, settings, stops, repeats, documents."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, question, repeats, until, tokens, more in (
        ("a", "Who saw the ferry?", 1, '["\\n"]', 8, {}),
        ("b", "The special magic number", 1, "[]", 3, {"other": 1}),
        ("c", "number for harbour is", 2, '["13"]', 5, {}),
    ):
        rows = [{"text": STORY * n, "question": question, **more} for n in (2, 3)]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        told = {"data": data, "repeats": repeats, "until": until, "tokens": tokens}
        (folder / f"{name}.yaml").write_text(GENERATE.format(name=name, **told))
        both = f"{ACC}, {{metric: acc_mutual_info}}" if name == "b" else ACC
        (folder / f"{name}_choice.yaml").write_text(CHOOSE.format(name=f"{name}_choice", data=data, metrics=both))
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(tasks: TaskManager, names: list[str], lm=None, args=(), **more):
    model = {"model": "kvcompressed", "model_args": {**ARGS, **dict(args)}} if lm is None else {"model": lm}
    return lm_eval.simple_evaluate(
        **model, tasks=names, task_manager=tasks, batch_size=2, device="cpu", bootstrap_iters=0, **more
    )


TIMES = ("total_s", "ttft_s", "tpot_s", "compression_s", "tokens_per_s", "decode_tokens_per_s", "warm_up", "batch_size")


def told(results) -> dict:
    """Of each task: answers, and what the samples say of their requests, without times."""
    return {
        name: [
            (
                sample["resps"],
                [{k: v for k, v in entry.items() if k not in TIMES} for entry in sample["efficiency"]],
                [set(entry) >= set(TIMES) for entry in sample["efficiency"]],
            )
            for sample in samples
        ]
        for name, samples in results["samples"].items()
    }


@pytest.mark.parametrize("question_in_prompt", [True, False])
def test_tasks_with_the_same_prompts_have_the_answers_and_numbers_that_each_has_alone(tasks, question_in_prompt):
    args = {"question_in_prompt": question_in_prompt}
    alone = {}
    for name in ("a", "b", "c", "a_choice", "b_choice"):
        got = run(tasks, [name], args=args)
        alone.update(told(got))
        assert list(got["config"]["kv_stats"]["by_task"]) == [name]
    lm = load("kvcompressed", batch_size=2, **SNAPKV, **args)
    for names, model in (
        (["a", "b", "c", "a_choice", "b_choice"], None),
        (["b_choice", "c", "b", "a_choice", "a"], lm),
        (["b", "a"], lm),
    ):
        got = run(tasks, names, model, args=args)
        mine = told(got)
        assert set(mine) == set(names)
        for name in names:
            for (answers, numbers, timed), (expected, known, _) in zip(mine[name], alone[name], strict=True):
                assert numbers == known and all(timed), name
                if name.endswith("choice"):
                    for got_one, wanted in zip(answers, expected, strict=True):
                        assert got_one[0][0] == pytest.approx(wanted[0][0], abs=2e-4)
                else:
                    assert answers == expected, name
        stats = got["config"]["kv_stats"]
        assert set(stats["by_task"]) == set(names)
        assert stats["requests"] == sum(one["requests"] for one in stats["by_task"].values())
        assert all(stats["by_task"][name]["requests"] == 2 + (name == "b_choice") for name in names)
        if not question_in_prompt and {"a", "b"} <= set(names):
            assert stats["by_task"]["a"]["question_tokens"] != stats["by_task"]["b"]["question_tokens"]
    if not question_in_prompt:
        assert told(run(tasks, ["a"]))["a"] != alone["a"], "the question matters"


def test_an_entry_is_that_of_its_own_request(tasks):
    samples = run(tasks, ["a", "b", "c"])["samples"]
    lm = load("kvcompressed", method="full")
    for name, limit in (("a", 8), ("b", 3), ("c", 5)):
        for sample in samples[name]:
            (entry,) = sample["efficiency"]
            assert entry["prompt_tokens"] == len(lm.tok_encode(sample["arguments"][0][0]))
            assert 1 <= entry["new_tokens"] <= limit
            assert len(sample["resps"][0]) == (2 if name == "c" else 1)
    assert all(sample["efficiency"][0]["new_tokens"] == 3 for sample in samples["b"])


def test_a_sample_has_one_entry_for_each_context_of_its_choices(tasks):
    for sample in run(tasks, ["b_choice"])["samples"]["b_choice"]:
        assert [args[0] == "" for args in sample["arguments"]] == [False] * 3 + [True] * 3
        context, empty = sample["efficiency"]
        assert context["prompt_tokens"] > 90 and empty["prompt_tokens"] == 1


def test_each_evaluation_has_its_own_statistics_also_after_one_that_failed(tasks, monkeypatch):
    lm = load("kvcompressed", batch_size=2, **SNAPKV)
    for names in (["a"], ["b", "a_choice"], ["a"]):
        stats = run(tasks, names, lm)["config"]["kv_stats"]
        assert set(stats["by_task"]) == set(names) and stats["requests"] == 2 * len(names)
        assert lm.get_model_info()["kv_stats"] == stats, "asking again changes nothing"
    with monkeypatch.context() as patched:
        patched.setattr(type(lm), "loglikelihood", None)
        with pytest.raises(TypeError):
            run(tasks, ["a", "a_choice"], lm)
    assert set(run(tasks, ["b"], lm)["config"]["kv_stats"]["by_task"]) == {"b"}


def test_an_evaluation_of_cached_answers_alone_does_not_tell_of_the_one_before(tasks, tmp_path):
    cache = str(tmp_path / "answers")
    lm = load("kvcompressed", batch_size=2, **SNAPKV)
    run(tasks, ["a"], lm, use_cache=cache)
    got = run(tasks, ["a"], lm, use_cache=cache)
    assert got["config"]["kv_stats"] == {"requests": 0, "from_request_cache": 2}
    assert [s["efficiency"] for s in got["samples"]["a"]] == [[{"from_request_cache": True}]] * 2


@pytest.mark.parametrize("by_name", [True, False])
def test_answers_of_the_request_cache_say_so_and_only_they(tasks, by_name, tmp_path):
    def ask(names):
        lm = None if by_name else load("kvcompressed", batch_size=2, **SNAPKV)
        return run(tasks, names, lm, use_cache=str(tmp_path / "answers"))

    first = ask(["a", "b_choice"])
    assert not any("from_request_cache" in e for s in told(first).values() for row in s for e in row[1])
    second = ask(["a", "c", "b_choice"])
    assert [row[1] for row in told(second)["a"]] == [[{"from_request_cache": True}]] * 2
    assert [row[1] for row in told(second)["b_choice"]] == [[{"from_request_cache": True}] * 2] * 2
    assert all("prompt_tokens" in row[1][0] for row in told(second)["c"])
    assert [s["resps"] for s in second["samples"]["a"]] == [s["resps"] for s in first["samples"]["a"]]


def test_the_request_cache_does_not_answer_one_question_with_another(tasks, tmp_path):
    """The prompts and settings of two tasks are the same, their questions are not."""
    args, cache = {"question_in_prompt": False}, str(tmp_path / "answers")
    names = ["a_choice", "b_choice", "c_choice"]
    alone = {name: told(run(tasks, [name], args=args))[name] for name in [*names, "a"]}
    for first in (["a", "b_choice"], ["c_choice", "b_choice"], [*names, "a"], [*names, "a"]):
        got = run(tasks, first, args=args, use_cache=cache)
        for name in first:
            for (answers, *_), (expected, *_) in zip(told(got)[name], alone[name], strict=True):
                flat = [[r[0] if isinstance(r, tuple) else r for r in row] for row in answers]
                assert flat == [
                    [pytest.approx(r[0], abs=2e-4) if isinstance(r, tuple) else r for r in row] for row in expected
                ]
    assert got["config"]["kv_stats"] == {"requests": 0, "from_request_cache": 2 * (3 + 6 + 3 + 1)}
    assert all(row[1][0] == {"from_request_cache": True} for rows in told(got).values() for row in rows)


def test_documents_are_kept_by_the_request_cache_too_where_questions_come_last(tmp_path):
    for known in (0, 1):
        lm = load("kvcompressed", **SNAPKV, question_in_prompt=False)
        caching = CachingLM(lm, str(tmp_path / "answers.db"))
        (score,) = caching.loglikelihood_rolling([request("loglikelihood_rolling", STORY * 2)])
        assert (score.efficiency == {"from_request_cache": True}) is bool(known)
        assert lm.get_model_info()["kv_stats"]["from_request_cache"] == known
        caching.dbdict.close()


def test_files_of_samples_have_the_field_too_for_an_lm_object(tasks, tmp_path):
    tracker = EvaluationTracker(output_path=str(tmp_path))
    got = run(tasks, ["a"], load("kvcompressed", batch_size=2, **SNAPKV), evaluation_tracker=tracker)
    expected = [s["efficiency"] for s in got["samples"]["a"]]
    tracker.save_results_aggregated(results={k: v for k, v in got.items() if k != "samples"}, samples=got["samples"])
    tracker.save_results_samples(task_name="a", samples=got["samples"]["a"])
    (file,) = tmp_path.rglob("samples_a_*.jsonl")
    assert [json.loads(line)["efficiency"] for line in Path(file).read_text().splitlines()] == expected


def test_answers_of_other_models_are_left_alone(tasks):
    load("kvcompressed", **SNAPKV)
    got = run(tasks, ["a", "a_choice"], load("hf", batch_size=2))
    assert not any("efficiency" in sample for samples in got["samples"].values() for sample in samples)


def test_a_document_that_is_scored_as_a_whole_says_what_it_cost_and_keeps_it_through_pickles():
    lm = load("kvcompressed", **SNAPKV)
    (score,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", STORY * 2)], disable_tqdm=True)
    assert isinstance(score, DocumentScore) and score.efficiency["prompt_tokens"] > 60
    answers = [score, Text("x", {"a": 1}), Choice((-1.0, True), {"b": 2})]
    again = pickle.loads(pickle.dumps(answers))  # as ranks hand them on
    assert again == answers and [a.efficiency for a in again] == [a.efficiency for a in answers]
    assert json.loads(json.dumps(again[1:])) == ["x", [-1.0, True]]


def test_requests_without_names_of_their_own_are_told_apart_by_their_documents():
    """One prompt, two documents of hand-made requests, whose questions begin at different places."""
    lm = load("kvcompressed", **SNAPKV, question_in_prompt=False)
    prompt = STORY * 2 + "Who saw the ferry? The number is"
    docs = [{"question": "Who saw the ferry?"}, {"question": "number is"}]
    settings = {"until": [], "max_gen_toks": 4}
    lm.generate_until([Instance("generate_until", d, (prompt, settings), 0) for d in docs], disable_tqdm=True)
    assert len({r.question_tokens for r in lm.compression_log.records}) == 2
    both = [Instance("loglikelihood", d, (prompt, c), 0) for d in docs for c in (" 48213", " 9")]
    got = [s for s, _ in lm.loglikelihood(both, disable_tqdm=True)]
    for i, doc in enumerate(docs):
        alone = [Instance("loglikelihood", doc, (prompt, c), 0) for c in (" 48213", " 9")]
        expected = [s for s, _ in lm.loglikelihood(alone, disable_tqdm=True)]
        assert got[2 * i : 2 * i + 2] == pytest.approx(expected, abs=2e-4)
    assert abs(got[0] - got[2]) > 1e-3


def test_choices_of_one_context_share_one_prefill_and_its_numbers():
    lm = load("kvcompressed", **SNAPKV)
    answers = lm.loglikelihood(choices(), disable_tqdm=True)
    assert len({id(a.efficiency) for a in answers}) == len(lm.compression_log.records) == 5
