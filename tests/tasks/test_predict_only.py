"""--predict_only on every kind of task of ours: answers are written, scores are not made."""

from __future__ import annotations

import json

import lm_eval
import pytest

from kv_lm_eval import plugin, tiny

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = ["kv_quickstart", "kv_ppl_file", "kv_needle_magic", "kv_needle_fwe", "kv_longbench_trec", "kv_longbench_e_trec"]
ROLLING = {"protocol": "rolling", "max_eval_tokens": None}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    where = tmp_path_factory.mktemp("data")
    row = {"input": "q", "context": "c c", "answers": ["a"], "length": 3, "all_classes": ["a", "b"], "_id": "x"}
    for name in ("trec", "trec_e"):
        (where / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (where / "a.txt").write_text("The boats lay still in the harbour. Nobody had come.\n")
    return {"lengths": [512], "depths": [50], "samples_per_cell": 1, "text_files": str(where / "a.txt"),
            "longbench_dir": str(where)}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "method", "extra"),
    [("kvcompressed", {"method": "full"}, {}), ("hf", {}, ROLLING),
     ("kvcompressed", {"method": "streaming_llm", "window_size": 28, "compress_every": 1}, {})],
)  # fmt: skip
def test_answers_are_written(model, method, extra, metadata):
    tasks = TASKS if not extra else ["kv_ppl_file", "kv_quickstart_ppl"]
    if extra:
        metadata = {**metadata, **extra}
        metadata.pop("lengths")
    with plugin.only_our_tasks():
        results = lm_eval.simple_evaluate(
            model=model, model_args={"pretrained": tiny.path(), "dtype": "float32", **method}, tasks=tasks, limit=1,
            device="cpu", batch_size=1, bootstrap_iters=0, predict_only=True, metadata=metadata,
        )  # fmt: skip
    samples = results["samples"]
    expected = {"kv_quickstart_needle", "kv_quickstart_choice", "kv_quickstart_ppl", *tasks} - {"kv_quickstart"}
    assert set(samples) == (expected if not extra else set(tasks))
    for task, rows in samples.items():
        assert len(rows) == 1 and rows[0]["resps"], task
        json.dumps(rows, default=str)
        found = {k.split(",")[0] for k in results["results"].get(task, {}) if "," in k}
        assert found <= {"bypass", "bypass_stderr"}, task
    if model == "kvcompressed":
        assert len(samples["kv_ppl_file"][0]["doc"]["per_token"]["nll"]) > 10
