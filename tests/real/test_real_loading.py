"""On real weights: a GGUF file is the folder made of it; two ranks and tensor parallelism answer as one process."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import real_models as real
from engine.test_sharded import run as run_on_ranks
from model.test_commands import results, run
from test_real_requests import answers, same

from kv_lm_eval import files
from kv_lm_eval.tasks.needle.tasks import counter_of

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_gguf_file_answers_as_the_folder_that_was_made_of_it() -> None:
    pytest.importorskip("gguf")
    if not Path(real.path("smollm2"), "model.gguf").is_file():
        pytest.skip("real models: smollm2/model.gguf is not there")
    settings = {"method": "snapkv", "max_capacity_prompt": 32, "window_size": 8}
    of_folder = answers(real.load("smollm2", batch_size=3, **settings))
    gc.collect()
    from lm_eval.api.registry import get_model

    made = get_model("kvcompressed")
    gguf = made(
        pretrained=real.path("smollm2"),
        gguf_file="model.gguf",
        dtype="float32",
        device="cpu",
        batch_size=3,
        **settings,
    )
    same(answers(gguf), of_folder, nats=1e-3)


def test_tasks_count_with_the_tokenizer_in_the_gguf_file() -> None:
    pytest.importorskip("gguf")
    counter = counter_of({"pretrained": real.path("smollm2"), "gguf_file": "model.gguf"})
    text = real.text(200)
    assert counter.tokenizer(text)["input_ids"] == real.tokenizer("smollm2")(text)["input_ids"]


def test_two_ranks_share_the_prompts_and_give_the_results_of_one(tmp_path: Path) -> None:
    model = f"pretrained={real.folder('smollm2')},dtype=float32,method=snapkv,max_capacity_prompt=64,window_size=16"
    metadata = json.dumps({"lengths": [160], "depths": [20, 80], "samples_per_cell": 2})
    words = ["--model", "kvcompressed", "--model_args", model, "--tasks", "kv_needle_magic", "--metadata", metadata]
    found = []
    for ranks in (1, 2):
        done = run(*words, "--device", "cpu", "--log_samples", "--output_path", str(ranks), cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        samples = next((tmp_path / str(ranks)).rglob("samples_*.jsonl"))
        said = {row["doc_id"]: row["resps"] for _, row in files.read_jsonl(samples)}
        found.append((results(tmp_path / str(ranks))["config"]["kv_stats"]["kept_fraction_mean"], said))
    assert found[0] == found[1] and len(found[0][1]) == 4


SCRIPT = """
import json, os, sys
from kv_lm_eval import evaluate

settings = {"max_capacity_prompt": 64, "dtype": "float32", **json.loads(sys.argv[2])}
metadata = {"lengths": [160], "depths": [20, 80], "samples_per_cell": 1}
model, tasks = os.environ["KV_REAL_MODEL"], ["kv_needle_magic"]
found = evaluate(model, method=sys.argv[1], tasks=tasks, metadata=metadata, **settings)
if os.environ.get("RANK", "0") == "0":
    stats = found["config"]["kv_stats"]
    answers = [sample["resps"] for sample in found["samples"]["kv_needle_magic"]]
    print("STATS", json.dumps([stats["kv_bytes_prefill_mean"], stats["kv_bytes_decode_mean"], answers]))
"""


def test_tensor_parallelism_on_two_processes_answers_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two KV heads: one on each."""
    monkeypatch.setenv("KV_REAL_MODEL", real.folder("qwen05"))
    monkeypatch.setattr("engine.test_sharded.SCRIPT", SCRIPT)
    outs = [run_on_ranks(ranks, "knorm", tmp_path) for ranks in (1, 2)]
    for out in outs:
        assert out.returncode == 0, out.stderr[-3000:]
    one, two = (json.loads(out.stdout.split("STATS ")[1].splitlines()[0]) for out in outs)
    assert one == two
