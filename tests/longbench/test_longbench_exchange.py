"""Predictions go to and from the official format, and a run's results say their official averages."""

import json
import subprocess
import sys

import pytest
from longbench.golden import CHECKOUT, OWN, read_jsonl

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import longbench_eval
from kv_lm_eval.tasks.longbench_tasks import predictions, report
from kv_lm_eval.tasks.longbench_tasks.specs import official, official_e


@pytest.fixture
def own(tmp_path):
    """The golden predictions as a folder of official files."""
    rows = read_jsonl(OWN / "scores.jsonl")
    for name in official():
        predictions.write(tmp_path / f"{name}.jsonl", [row for row in rows if row["dataset"] == name])
    return tmp_path


def expected(name):
    scores = [row["official_score"] for row in read_jsonl(OWN / "scores.jsonl") if row["dataset"] == name]
    return round(100 * sum(scores) / len(scores), 2)


def test_a_folder_is_scored_without_lm_eval_or_torch(own):
    done = subprocess.run(
        [sys.executable, CHECKOUT / "scripts" / "longbench_eval.py", own],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    result = json.loads((own / "result.json").read_text())
    assert result == {name: pytest.approx(expected(name), abs=0.011) for name in official()}
    averages = json.loads((own / "averages.json").read_text())
    assert averages == json.loads(done.stdout.splitlines()[-1])
    assert set(averages["averages"]["en"]["categories"]) == set(averages["averages"]["zh"]["categories"])
    assert f"{averages['averages']['mean16']:.2f}" in done.stdout and "English average" in done.stdout
    code = (
        "import sys; from kv_lm_eval.experiments import longbench_eval; "
        "print([m for m in ('torch', 'lm_eval', 'transformers') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'scripts'}"},
    )  # fmt: skip
    assert loaded.stdout.strip() == "[]"


def test_longbench_e_is_scored_by_length(own, capsys):
    for name in set(official()) - set(official_e()):
        (own / f"{name}.jsonl").unlink()
    assert longbench_eval.main([str(own), "--e"]) == 0
    result = json.loads((own / "result.json").read_text())
    assert set(result) == set(official_e())
    rows = read_jsonl(own / "lcc.jsonl")
    there = {"0-4k": any(r["length"] < 4000 for r in rows), "8k+": any(r["length"] >= 8000 for r in rows)}
    assert {bucket: bucket in result["lcc"] for bucket in there} == there
    assert "LongBench-E" in capsys.readouterr().out


def test_extra_metrics_are_named_as_not_official(own, capsys):
    assert longbench_eval.main([str(own), "--extra"]) == 0
    assert "code_sim_levenshtein: NOT official" in capsys.readouterr().out
    extra = json.loads((own / "averages.json").read_text())["extra"]
    assert set(extra) == {"rouge_score_l", "rouge_score_l_zh", "code_sim_levenshtein"}
    assert "extra" not in json.loads((own / "result.json").read_text())


def samples(folder, task, rows, date="2026-01-01T00-00-00.5"):
    lines = [
        {"doc_id": i, "doc": {"answers": r["answers"], "all_classes": r["all_classes"], "length": r["length"]},
         "resps": [[r["pred"]]], "filtered_resps": [r["pred"].strip()]}
        for i, r in enumerate(rows)
    ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in reversed(lines))
    (folder / f"samples_{task}_{date}.jsonl").write_text(text, encoding="utf-8")


def test_samples_of_lm_eval_become_official_files_in_order_and_unstripped(tmp_path, capsys):
    rows = [row for row in read_jsonl(OWN / "scores.jsonl") if row["dataset"] == "samsum"]
    rows[0]["pred"] = "\n \u4f60\u2028 x \n"
    samples(tmp_path, "kv_longbench_samsum", rows)
    samples(tmp_path, "kv_longbench_e_samsum", rows[:2])
    assert longbench_eval.main([str(tmp_path), "--from-samples"]) == 0
    assert predictions.read(tmp_path / "pred" / "samsum.jsonl") == [{k: r[k] for k in predictions.FIELDS} for r in rows]
    assert "\u4f60" in (tmp_path / "pred" / "samsum.jsonl").read_text(encoding="utf-8")
    assert set(json.loads((tmp_path / "pred_e" / "result.json").read_text())["samsum"]) <= {"0-4k", "4-8k", "8k+"}
    (tmp_path / "pred" / "result.json").unlink()
    assert longbench_eval.main([str(next(tmp_path.glob("samples_kv_longbench_samsum_*"))), "--from-samples"]) == 0
    assert list(json.loads((tmp_path / "pred" / "result.json").read_text())) == ["samsum"]
    capsys.readouterr()


@pytest.mark.parametrize("name, text, message", [
    ("trec.jsonl", "", "no predictions"),
    ("trec.jsonl", '{"pred": "x"}\n', "line 1"),
    ("trek.jsonl", '{"pred": "x", "answers": []}\n', "did you mean 'trec'"),
    ("notes.txt", "", "no <dataset>.jsonl"),
])  # fmt: skip
def test_what_cannot_be_scored_says_why(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert longbench_eval.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def results(folder, scores, e=None, effective=200):
    """A results file as lm-eval writes it."""
    tasks = {f"kv_longbench_{n}": (n, False, {"score,none": s, "truncated,none": 0.5}) for n, s in scores.items()}
    for name, buckets in (e or {}).items():
        values = {"score,none": 1.0, **{f"score_{b},none": v for b, v in buckets.items()}}
        tasks[f"kv_longbench_e_{name}"] = (name, True, values)
    protocol = {"protocol": "snapkv", "max_length": 31500}
    content = {
        "results": {task: values for task, (_, _, values) in tasks.items()},
        "n-samples": {task: {"original": 200, "effective": effective} for task in tasks},
        "configs": {
            task: {"metadata": {"longbench": {**protocol, "dataset": name, "longbench_e": is_e}}}
            for task, (name, is_e, _) in tasks.items()
        },
    }  # fmt: skip
    file = folder / "results_2026-01-01T00-00-00.5.json"
    file.write_text(json.dumps(content))
    return file


def test_a_run_gets_its_official_numbers_beside_its_results(tmp_path):
    file = results(tmp_path, {name: 50.0 for name in official()}, e={"trec": {"0-4k": 10.0, "4-8k": float("nan")}})
    rows = [row for row in read_jsonl(OWN / "scores.jsonl") if row["dataset"] == "trec"]
    samples(tmp_path, "kv_longbench_trec", rows)
    samples(tmp_path, "kv_longbench_e_trec", rows)
    samples(tmp_path, "kv_longbench_lcc", rows, date="2025-01-01T00-00-00.5")  # of another run
    page = report.write(file)
    assert "protocol snapkv; prompts cut to 31500 tokens" in page
    assert "50.00   English average" in page and "Not all samples" not in page
    written = json.loads((tmp_path / "longbench_2026-01-01T00-00-00.5.json").read_text())
    assert written["averages"]["zh"]["average"] == written["averages"]["mean16"] == 50.0
    assert written["datasets_e"] == {"trec": {"0-4k": 10.0}}
    assert written["protocols"] == ["snapkv"]
    folder = tmp_path / "longbench_2026-01-01T00-00-00.5"
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.jsonl"))
    assert found == ["pred/trec.jsonl", "pred_e/trec.jsonl"]
    assert len(predictions.read(folder / "pred" / "trec.jsonl")) == 8


def test_a_part_of_the_benchmark_says_what_is_missing(tmp_path, capsys):
    file = results(tmp_path, {"trec": 50.0}, effective=4)
    assert longbench_eval.main([str(file)]) == 0
    page = capsys.readouterr().out
    assert "no en: 15 of its datasets" in page and "Not all samples were run" in page
    assert (tmp_path / "longbench_2026-01-01T00-00-00.5.json").is_file()


def test_a_run_without_longbench_says_nothing(tmp_path):
    file = tmp_path / "results_x.json"
    file.write_text(json.dumps({"results": {"arc": {"acc,none": 1}}, "configs": {"arc": {"metadata": {"version": 1}}}}))
    assert report.write(file) == ""
    assert [p.name for p in tmp_path.iterdir()] == ["results_x.json"]
    assert longbench_eval.main([str(file)]) == 2


def test_predictions_without_length_cannot_be_scored_by_length():
    rows = [{"pred": "x", "answers": ["x"], "all_classes": None, "length": None}]
    with pytest.raises(UserError, match="1 of 1 predictions have no length"):
        predictions.dataset_score_e(official()["qasper"], rows)
