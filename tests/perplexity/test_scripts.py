"""The scripts on the embedded model and a small text; the loops under them against plain ones."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny as tiny_models
import torch

from kv_lm_eval.engine.recompute import windows_of
from kv_lm_eval.engine.stepwise import steps
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.engine.windows import Plain, score_windows, strided
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines
from kv_lm_eval.metrics import paired

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = ["The boats lay still in the harbour.", "Nobody had seen the ferry.", "Gulls walked on the stones; 48213."]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("book") / "book.txt"
    order = np.random.default_rng(0).integers(0, 3, 120)
    file.write_text(" ".join(SENTENCES[i] for i in order), encoding="utf-8")
    return file


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script as a user does, in this process: its last line as JSON, or its complaint."""

    def run(name, *arguments, fails=False):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        captured = capsys.readouterr()
        assert end.value.code == (2 if fails else 0), captured.err
        return captured.err if fails else json.loads(captured.out.splitlines()[-1])

    return run


# ---------------------------------------------------------------------------------------------- the loops


@pytest.mark.parametrize("prefill", [1, 10, 30])
@pytest.mark.parametrize(
    "settings", [{"compress_every": 1}, {"compress_every": 6}, {"compress_every": 6, "cache_slack": 3, "max_drop": 2}]
)
def test_the_timed_loop_has_the_numbers_of_the_fast_one(prefill, settings):
    pair, row = tiny_models.pair("llama"), tiny_models.tokens(80)

    def new():
        return pair.cache(method="streaming_llm", n_sink=2, window_size=10, **settings)

    timed = [step for step, _ in steps(pair.model, new, row, prefill)]
    every = settings["compress_every"]
    (fast,), _ = score_documents(
        pair.model, new, [row[1:]], Stream(row[0], every, prefill_tokens=prefill if prefill > 1 else 0)
    )
    assert [-step.nll for step in timed] == pytest.approx(fast.log_probs.tolist(), abs=1e-4)
    assert [step.correct for step in timed] == fast.greedy.tolist()
    assert [step.slots for step in timed] == fast.slots.tolist()
    assert [(step.fed, step.dropped) for step in timed if step.dropped] == fast.evictions
    assert [step.prefill for step in timed] == [i < prefill and prefill > 1 for i in range(79)]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize(("length", "batch_size"), [(7, 1), (7, 5), (200, 4)])
@torch.inference_mode()
def test_recompute_is_a_fresh_forward_for_every_token(name, length, batch_size):
    model, row = tiny_models.pair(name).stock, tiny_models.tokens(30)
    windows = list(windows_of(row, 1, length))
    scores = score_windows(Plain(lambda ids, k: model(ids, use_cache=False).logits[:, -k:], batch_size, "cpu"), windows)
    got = torch.cat([lp for lp, _ in scores]).tolist()
    expected = []
    for t in range(len(row) - 1):
        window = row[max(0, t - length + 1) : t + 1]
        expected.append(model(torch.tensor([window]), use_cache=False).logits[0, -1].log_softmax(-1)[row[t + 1]].item())
    assert got == pytest.approx(expected, abs=1e-5)
    assert [w.start for w in windows] == [1, *range(length + 1, 30)]


@pytest.mark.parametrize(("tokens", "length", "stride"), [(30, 8, 3), (30, 8, 8), (30, 40, 20), (9, 8, 1), (1, 4, 2)])
def test_strided_windows_score_each_token_once_with_the_longest_context_at_hand(tokens, length, stride):
    text = list(range(100, 100 + tokens))
    windows = list(strided(text, length, stride))
    places = [w.start + i for w in windows for i in range(len(w.targets))]
    assert all(text[w.start - len(w.context) : w.start] == w.context for w in windows)
    assert all(len(w.context) + len(w.targets) <= length and w.context for w in windows)
    expected = [t for t in range(1, tokens) if stride < length or t % stride]
    assert places == expected


# ---------------------------------------------------------------------------------------------- baselines


def test_a_baseline_of_another_configuration_is_refused_by_its_key(book, tmp_path, script):
    common = ["--model", "kv-tiny", "--dtype", "float32", "--text-files", book, "--timed-tokens", 8]
    made = script("fixed_baseline.py", *common, "--max-eval-tokens", 150, "--window-size", 28, "--output-dir", tmp_path)
    kept = json.loads(Path(made["file"]).read_text())
    assert kept["key"]["window"] == 32 and len(kept["full"]["nll"]) == len(kept["recompute"]["nll"]) == 150
    assert made["full"]["perplexity"] == pytest.approx(np.exp(np.mean(kept["full"]["nll"])), rel=1e-5)
    setup = baselines.load("kv-tiny", "files", text_files=[str(book)], max_eval_tokens=150, dtype="float32")
    assert baselines.read(Path(made["file"]), setup.key(32)) == kept
    assert baselines.path_of(setup.key(32), tmp_path) == Path(made["file"])
    for other in (setup.key(33), {**setup.key(32), "dtype": "float16"}, {**setup.key(32), "weights": "x"}):
        with pytest.raises(UserError, match="another configuration"):
            baselines.read(Path(made["file"]), other)
        assert not baselines.path_of(other, tmp_path).is_file()
    said = script(
        "streaming_eval.py", *common, "--max-eval-tokens", 149, "--window-size", 28,
        "--baseline-results", made["file"], fails=True,
    )  # fmt: skip
    assert "another configuration" in said and "149" in said


def test_streaming_eval_compares_with_both_baselines_on_the_same_tokens(book, tmp_path, script):
    common = ["--model", "kv-tiny", "--dtype", "float32", "--text-files", book, "--max-eval-tokens", 200]
    common += ["--timed-tokens", 8, "--fixed-baseline-dir", tmp_path / "base", "--nll-dir", tmp_path / "nll"]
    found = script(
        "streaming_eval.py", *common, "--window-size", 28, "--compress-every", 8, "--output", tmp_path / "out.json"
    )
    assert json.loads((tmp_path / "out.json").read_text()) == found
    streaming, base = found["streaming"], found["baseline"]
    assert streaming["peak_slots"] == 40 and streaming["prefill_tokens"] == 32 and streaming["prunes"] == 21
    assert base["full"]["peak_slots"] == 200 and base["full"]["kv_bytes_peak"] > streaming["kv_bytes_peak"] > 0
    for name in ("full", "recompute"):
        got = found["metrics"][name]
        ratio = streaming["perplexity"] / base[name]["perplexity"]
        assert got["ppl_increase_percent_all"]["mean"] == pytest.approx(100 * (ratio - 1), abs=1e-3)
        assert got["speedup"] == pytest.approx(base[name]["tpot_s"] / streaming["tpot_s"])
    files = {n: paired.read(tmp_path / "nll" / f"{n}.jsonl") for n in ("full", "streaming")}
    compared = paired.compare(files["full"], files["streaming"], block=16)
    assert compared["all"]["tokens"] == 200 and compared["after_first_eviction"]["tokens"] == 160
    mit = script("streaming_eval.py", *common, "--window-size", 28, "--streaming-mode", "mit", "--mode", "streaming")
    assert mit["streaming"]["peak_slots"] == 33 and "metrics" not in mit
    total = script("streaming_eval.py", *common, "--total-budget", 40, "--compress-every", 8, "--mode", "streaming")
    assert total["streaming"]["perplexity"] == streaming["perplexity"]  # 40 - 8 leaves the same sinks and window


def test_streaming_eval_with_refresh_gives_what_the_evaluation_gives(book, script):
    """A method with a cache of its own: the same settings through lm_eval and through the script."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from kv_lm_eval import plugin

    common = ["--model", "kv-tiny", "--dtype", "float32", "--text-files", book, "--max-eval-tokens", 200]
    common += ["--timed-tokens", 8, "--mode", "streaming", "--window-size", 28, "--compress-every", 8]
    plain = script("streaming_eval.py", *common)["streaming"]["perplexity"]
    found = script("streaming_eval.py", *common, "--refresh-budget", 8, "--refresh-policy", "uniform")["streaming"]
    plugin.install()
    settings = {"n_sink": 4, "window_size": 28, "compress_every": 8, "refresh_budget": 8, "refresh_policy": "uniform"}
    model_args = {"pretrained": "kv-tiny", "dtype": "float32", "method": "streaming_llm", **settings}
    metadata = {"text_files": [str(book)], "max_eval_tokens": 200, "protocol": "prefill_then_stream"}
    with plugin.only_our_tasks():
        index = TaskManager(metadata={**model_args, **metadata})
    results = simple_evaluate(
        model=plugin.MODEL_NAME, model_args=model_args, tasks=["kv_ppl_file"], task_manager=index, device="cpu",
        bootstrap_iters=0,
    )  # fmt: skip
    assert found["perplexity"] == pytest.approx(results["results"]["kv_ppl_file"]["perplexity,none"], rel=1e-5)
    assert found["perplexity"] > 1.05 * plain, "the negative control harms"


def test_diagnose_pruning_writes_every_token_and_finds_no_spike_where_none_is(book, tmp_path, script):
    found = script(
        "diagnose_pruning.py", "--model", "kv-tiny", "--dtype", "float32", "--text-files", book,
        "--max-eval-tokens", 300, "--window-size", 28, "--compress-every", 12, "--output-dir", tmp_path,
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "tokens.csv").open()))
    events = json.loads((tmp_path / "prune_events.json").read_text())
    assert len(rows) == 300 and [int(r["token_index"]) for r in rows] == list(range(300))
    assert [e["token_index"] for e in events] == [int(r["token_index"]) for r in rows if r["pruned"] == "1"]
    assert [e["token_index"] for e in events] == list(range(43, 300, 12))
    assert all(e["slots_before"] == 44 and e["dropped"] == 12 for e in events)
    assert max(int(r["kv_len"]) for r in rows) == found["peak_slots"] == 44
    before_any = [r for r in rows if int(r["token_index"]) < 33]
    assert all(float(r["nll"]) == pytest.approx(float(r["reference_nll"]), abs=1e-4) for r in before_any)
    assert found["spikes"]["events"] == len(events) and found["spikes"]["horizon"] == 6
    assert found["spikes"]["verdict"] in ("spike", "no spike") and found["latency"]["prune_step_median_ms"] > 0
    assert (tmp_path / "spikes.png").stat().st_size > 5000
    delta = paired.compare(paired.read(tmp_path / "reference.jsonl"), paired.read(tmp_path / "method.jsonl"), block=16)
    assert delta["all"]["tokens"] == 300


# ---------------------------------------------------------------------------------------------- paired runs


def record(nll, first_eviction=None, **changes):
    plain = {
        "document": "d", "reading": {"protocol": "streaming"}, "model": "m", "settings": {},
        "tokens": list(range(len(nll))), "nll": nll, "first_eviction": first_eviction,
    }  # fmt: skip
    return {**plain, **changes}


def write(file, *records):
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return file


def test_compare_nll_takes_shared_targets_only_and_gives_the_error(tmp_path, script):
    rng = np.random.default_rng(1)
    base = rng.gamma(2, 1.5, 4000)
    worse = base + 0.02 + rng.normal(0, 0.3, 4000)
    a = write(tmp_path / "a.jsonl", record(base.tolist(), 1000))
    b = write(tmp_path / "b.jsonl", record([None, *worse[1:3800].tolist()], 900))
    found = script("compare_nll.py", a, b, "--block", 100)
    assert found["all"]["tokens"] == 3799 and found["after_first_eviction"]["tokens"] == 2900
    assert found["all"]["nll_difference_nats"] == pytest.approx((worse - base)[1:3800].mean())
    assert found["all"]["low"] < 0.02 < found["all"]["high"]
    assert found["all"]["ppl_change_percent"] == pytest.approx(100 * (np.exp((worse - base)[1:3800].mean()) - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [0, 1, 9]}, "different tokens"),
        ({"model": "other"}, "models differ"),
        ({"reading": {"protocol": "rolling"}}, "protocols differ"),
        ({"reading": {"protocol": "streaming", "strided_length": 9}}, "strided_length differ"),
        ({"document": "e"}, "different documents"),
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_refused(tmp_path, change, message):
    a = write(tmp_path / "a.jsonl", record([1.0, 2, 3]))
    b = write(tmp_path / "b.jsonl", record([1.0, 2, 3], **change))
    with pytest.raises(ValueError, match=message):
        paired.compare(paired.read(a), paired.read(b))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"nll": [1.0], "tok', "line 1: not whole JSON"),
        ('{"nll": "abc"}', "line 1: reading: field required"),
        ("[1, 2]", "line 1: input should be a valid dictionary"),
        (json.dumps(record([1.0, 2.0], tokens=[1])), "line 1: 1 tokens and 2 numbers"),
        (json.dumps(record([1.0, 2.0], tokens=["a", "b"])), "tokens.0: input should be a valid integer"),
        ("", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, script, content, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = script("compare_nll.py", file, file, fails=True).strip()
    assert message in said and "a.jsonl" in said and len(said.splitlines()) == 1


def test_six_documents_are_observations_and_fewer_are_cut_into_blocks(tmp_path, script):
    rng = np.random.default_rng(2)
    for n, unit, block in ((8, "texts", None), (3, "blocks", 64), (3, "blocks", 20)):
        rows = [[record((rng.normal(size=500) + i).tolist(), 0, document=str(i)) for i in range(n)] for _ in "ab"]
        a, b = (write(tmp_path / f"{name}.jsonl", *side) for name, side in zip("ab", rows, strict=True))
        found = script("compare_nll.py", a, b, *([] if block in (None, 64) else ["--block", block]))["all"]
        assert (found["unit"], found["block_tokens"]) == (unit, block)
        assert found["low"] < found["nll_difference_nats"] < found["high"]


def test_lm_evals_samples_are_read_and_other_files_are_told(tmp_path, script):
    sample = {"doc_id": 0, "doc": {"name": "x", "per_token": record([1.0, 2.0])}, "resps": [["-3.0"]]}
    assert paired.read(write(tmp_path / "samples.jsonl", sample))["x"]["nll"] == [1.0, 2.0]
    said = script("compare_nll.py", write(tmp_path / "no.jsonl", {"doc": {}}), tmp_path / "no.jsonl", fails=True)
    assert "no per-token numbers" in said


# ---------------------------------------------------------------------------------------------- files and exits

SCRIPTS = {
    "streaming_eval.py": ("--text-files", "--output"),
    "diagnose_pruning.py": ("--text-files", "--output-dir"),
    "fixed_baseline.py": ("--text-files", "--output-dir"),
    "analyze_heads.py": ("--text", "--output_path"),
    "ablate_heads.py": ("--text", None),
}


def never(*_, **__):
    raise AssertionError("the weights were loaded before a mistake in the arguments was found")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", ["missing", "binary", "folder without texts", "empty"])
def test_a_text_that_cannot_be_read_is_one_line_before_any_weights(name, kind, tmp_path, monkeypatch, script):
    monkeypatch.setattr(baselines, "load_model", never)
    file = tmp_path / "text.txt"
    if kind == "binary":
        file.write_bytes(b"\x89PNG\xff\x00")
    elif kind == "empty":
        file.write_bytes(b"\xef\xbb\xbf\r\n")
    elif kind != "missing":
        file.mkdir()
    text, output = SCRIPTS[name]
    more = ["--model", "kv-tiny", *([output, tmp_path / "out"] if output else [])]
    more += ["--rows", "A_window:base_window=8", "--profile", "none"] if name == "ablate_heads.py" else []
    more += ["--mode", "streaming"] if name == "streaming_eval.py" else []
    said = script(name, *more, text, file, fails=True).strip()
    assert "text.txt" in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("name", [name for name, (_, output) in SCRIPTS.items() if output])
def test_an_output_that_cannot_be_written_is_one_line_before_any_weights(name, book, tmp_path, monkeypatch, script):
    monkeypatch.setattr(baselines, "load_model", never)
    text, output = SCRIPTS[name]
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    wrong = [tmp_path / "file" / "below"]
    wrong += [tmp_path / "folder"] if output == "--output" else [tmp_path / "file"]
    for path in wrong:
        said = script(name, "--model", "kv-tiny", text, book, output, path, fails=True).strip()
        assert output in said and str(tmp_path) in said and len(said.splitlines()) == 1, said


def test_a_damaged_baseline_is_one_line(book, tmp_path, script):
    for content, message in (("{", "not whole JSON"), ('{"key": {}}', "recompute: field required")):
        (tmp_path / "base.json").write_text(content)
        said = script(
            "streaming_eval.py", "--model", "kv-tiny", "--text-files", book, "--max-eval-tokens", 50,
            "--window-size", 28, "--baseline-results", tmp_path / "base.json", fails=True,
        )  # fmt: skip
        (line,) = (line for line in said.splitlines() if "stopped" in line)
        assert message in line and "base.json" in line and "Traceback" not in said


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_one_book_is_one_text_whatever_system_saved_it_and_whoever_reads_it(ends, mark, tmp_path, monkeypatch):
    """The task, the streaming scripts and the head scripts: the same words, tokens and bytes."""
    from kv_lm_eval.analysis import ablate, analyze
    from kv_lm_eval.tasks.perplexity import texts

    lines = ["A line.", "", "Another — with a dash.", ""] * 20
    file = tmp_path / "book.txt"
    file.write_bytes(mark + ends.join(lines).encode())
    expected = "\n".join(lines)
    (row,) = texts.files(str(file))
    assert row["text"] == expected and row["bytes"] == len(expected.encode())
    setup = baselines.load("kv-tiny", "files", text_files=[str(file)])
    ids = setup.tokenizer(expected, add_special_tokens=False).input_ids
    assert setup.row[1:] == ids
    seen = []

    class Tokenizer:
        bos_token_id = eos_token_id = 0

        def __call__(self, text, **_):
            seen.append(text)
            raise UserError("read")

    monkeypatch.setattr(baselines, "load_model", lambda *_: (Tokenizer(), None))
    monkeypatch.setattr(analyze, "wrap", lambda *_: type("Facts", (), {"max_positions": 512}))
    analyze.main(["--text", str(file), "--output_path", str(tmp_path / "out")])
    uniform = ["--rows", "A_window:base_window=8", "--against", "A_window:base_window=9", "--profile", "none"]
    ablate.main(["--text", str(file), *uniform])
    assert seen == [expected, expected]
