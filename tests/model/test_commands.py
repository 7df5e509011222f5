"""The command line as a user types it: stock tasks over local data, results files, errors, two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from model.test_requests import METHODS, STORY

from kv_lm_eval import plugin

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")

STOCK_TASKS = {
    "my_choice": """
task: my_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}} The special magic number for harbour is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "my_generate": """
task: my_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}} The special magic number for harbour is"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def run(*arguments: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess:
    here = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(here), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kv_lm_eval", "run", *arguments]
    if ranks > 1:
        env["ACCELERATE_USE_CPU"] = "true"
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        command = [*launcher, "-m", *command[2:]]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def results(folder: Path) -> dict:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


@pytest.fixture
def local_tasks(tmp_path: Path) -> Path:
    rows = [{"text": STORY * n, "choices": ["70192", "48213", "55110"], "label": 1} for n in (1, 2, 3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, yaml in STOCK_TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.replace("DATA", str(tmp_path / "data.jsonl")))
    return tmp_path


def test_stock_tasks_over_a_local_data_set_run_under_every_method(local_tasks):
    manager = TaskManager(include_path=str(local_tasks), include_defaults=False)
    for settings in [{"method": "full"}, {"method": "no_cache"}, *METHODS]:
        got = lm_eval.simple_evaluate(
            model="kvcompressed",
            model_args={"pretrained": "kv-tiny", "dtype": "float32", **settings},
            tasks=list(STOCK_TASKS),
            task_manager=manager,
            batch_size=2,
            device="cpu",
            bootstrap_iters=0,
        )
        assert got["config"]["kv_stats"]["requests"] == 6
        assert set(got["results"]) == set(STOCK_TASKS)
        if settings["method"] == "full":
            assert got["results"]["my_choice"]["acc,none"] == 1


def test_the_command_writes_a_results_file_that_says_what_was_compressed(tmp_path):
    args = "pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128,window_size=16"
    tasks = ["--tasks", "kv_quickstart_needle", "--limit", "2"]
    done = run("--model", "kvcompressed", "--model_args", args, *tasks, "--output_path", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = results(tmp_path / "out")["config"]
    assert config["kv_compression"] == {
        "method": "snapkv",
        "layer_budget": "uniform",
        "rounding": "exact",
        "window_size": 16,
        "kernel_size": 7,
        "pooling": "max",
        "gqa": "kv_head",
        "max_capacity_prompt": 128,
        "head_budget": "uniform",
        "compress_every": 0,
        "trigger": "clock",
        "cache_slack": 0,
        "max_drop": 0,
        "skip_layers": [],
        "evicted": "drop",
        "tail_tokens": 1,
        "rolling_compress_every": 64,
        "overlong": "error",
        "question_in_prompt": True,
        "question_field": None,
        "prefill_chunk": None,
        "prefill_evict": None,
        "compile": False,
        "fidelity": False,
    }
    assert config["kv_stats"]["requests"] == 2
    assert config["kv_stats"]["by_task"]["kv_quickstart_needle"]["compressed_share"] == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("pretrained=kv-tiny,method=snapkv,max_capacity_prompt=64,window_size=64", "leaves no room"),
        ("pretrained=kv-tiny,method=snapkv,max_capacity_promt=64", "did you mean 'max_capacity_prompt'"),
    ],
)
def test_a_wrong_setting_ends_with_a_message_and_status_2_and_writes_nothing(args, words, tmp_path):
    done = run("--model", "kvcompressed", "--model_args", args, "--tasks", "kv_quickstart_needle", cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr.replace("\n  ", " ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_and_three_ranks_give_the_numbers_of_one(tmp_path):
    """Five prompts of unlike lengths, which neither number shares out evenly."""
    args = "pretrained=kv-tiny,dtype=float32,method=snapkv,max_capacity_prompt=100,window_size=16"
    common = ["--model", "kvcompressed", "--model_args", args, "--tasks", "kv_quickstart_needle", "--limit", "5"]
    found = []
    for ranks in (1, 2, 3):
        out = str(tmp_path / f"ranks{ranks}")
        done = run(*common, "--device", "cpu", "--output_path", out, cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append(results(Path(out)))
    for more in found[1:]:
        assert more["results"]["kv_quickstart_needle"] == found[0]["results"]["kv_quickstart_needle"]
        assert without_times(more["config"]["kv_stats"]) == without_times(found[0]["config"]["kv_stats"])


def without_times(stats: dict) -> dict:
    return {k: without_times(v) if isinstance(v, dict) else v for k, v in stats.items() if k != "efficiency"}
