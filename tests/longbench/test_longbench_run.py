"""The same tasks run through our model and through lm-eval's hf model, and ask and score the same."""

import json

import pytest

from kv_lm_eval import plugin, tiny

TASKS = ["kv_longbench_trec", "kv_longbench_samsum", "kv_longbench_qasper"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name in ("trec", "samsum", "qasper"):
        rows = [
            {"input": f"What is {i}?", "context": "The pass key for apple is 7. " * 60 * i, "answers": ["yes", "7"],
             "length": 100, "dataset": name, "language": "en", "all_classes": ["yes", "7"], "_id": str(i)}
            for i in (0, 1)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    def evaluate(model, **model_args):
        metadata = {**model_args, "longbench_dir": str(folder), "longbench_max_length": 300}
        with plugin.only_our_tasks():
            index = TaskManager(metadata=metadata)
        return lm_eval.simple_evaluate(
            model=model, model_args=model_args, tasks=TASKS, task_manager=index, device="cpu", batch_size=2,
            bootstrap_iters=0, limit=2, gen_kwargs={"max_gen_toks": 8},
        )  # fmt: skip

    return evaluate


def answers(results):
    return {task: [sample["resps"] for sample in results["samples"][task]] for task in TASKS}


def test_our_model_without_compression_answers_as_hf_does(run):
    ours = run("kvcompressed", pretrained="kv-tiny", method="full")
    theirs = run("hf", pretrained=tiny.path())
    assert answers(ours) == answers(theirs)
    for task in TASKS:
        assert ours["results"][task]["score,none"] == theirs["results"][task]["score,none"]
        assert [s["truncated"] for s in ours["samples"][task]] == [0, 1]
        assert all(s["prompt_tokens_kept"] <= 310 for s in ours["samples"][task])
        assert ours["configs"][task]["metadata"]["longbench"]["max_length"] == 300
    first = [sample["resps"][0][0] for sample in ours["samples"]["kv_longbench_samsum"]]
    assert all("\n" not in answer[:-1] for answer in first)  # the newline token ends it, and is part of it


def test_a_compressed_run_says_what_it_kept(run):
    results = run("kvcompressed", pretrained="kv-tiny", method="snapkv", max_capacity_prompt=64, window_size=16)
    assert results["config"]["kv_stats"]["by_task"]["kv_longbench_qasper"]["compressed_share"] == 1
