"""Score LongBench predictions without a model: the official eval.py, bit for bit, and the averages people print.

Why: old predictions, of anyone, can be scored anew, and ours can go to the official script.

Usage:
    python scripts/longbench_eval.py PRED_DIR            # a folder of <dataset>.jsonl, as the official pred.py writes
    python scripts/longbench_eval.py PRED_DIR --e        # LongBench-E: by length
    python scripts/longbench_eval.py --from-samples DIR  # lm-eval's samples_*.jsonl (or one) -> pred, pred_e, scored
    python scripts/longbench_eval.py results_DATE.json   # an lm-eval run: its averages, written beside it

Output: PRED_DIR/result.json as the official script writes it ({dataset: score}, with --e {dataset: {bucket: score}}; a
bucket without samples is absent), PRED_DIR/averages.json beside it, a table, and the same as one JSON document on the
last line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_lm_eval import console, files
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.tasks.longbench_tasks import predictions, report
from kv_lm_eval.tasks.longbench_tasks.specs import Spec, official


def main(argv: Sequence[str] | None = None) -> int:
    return console.command("longbench_eval", lambda: _main(argv), lambda: "The same command scores all of it again.")


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="longbench_eval.py", description=__doc__)
    parser.add_argument("path", type=Path, help="folder of predictions, or an lm-eval results file")
    parser.add_argument("--e", action="store_true", help="LongBench-E: scores by length")
    parser.add_argument("--from-samples", action="store_true", help="the folder holds lm-eval's samples_*.jsonl")
    parser.add_argument("--extra", action="store_true", help="also metrics that are not official (averages.json)")
    args = parser.parse_args(argv)
    documents = _run(args.path, args.e, args.from_samples, args.extra)
    for document in documents:
        print(report.page(document))
        for name, values in document.get("extra", {}).items():
            print(f"  {name}: NOT official: {values}")
    print(json.dumps(documents[0] if len(documents) == 1 else documents, ensure_ascii=False))
    return 0


def _run(path: Path, e: bool, from_samples: bool, extra: bool) -> list[dict[str, Any]]:
    if path.is_file() and not from_samples:
        found = report.summary(report.read(path))
        if not found:
            raise UserError(f"{path} holds no results of kv_longbench tasks")
        report.write(path)
        return [found]
    if from_samples and path.is_file():
        return [score_folder(folder, folder.name == "pred_e", extra) for folder in convert_samples(path.parent, [path])]
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a file")
    if not from_samples:
        return [score_folder(path, e, extra)]
    folders = convert_samples(path)
    return [score_folder(folder, folder.name == "pred_e", extra) for folder in folders]


def convert_samples(folder: Path, given: Sequence[Path] | None = None) -> list[Path]:
    """Writes official predictions from the newest samples file of each LongBench task; returns the folders made."""
    found = sorted(folder.glob("samples_kv_longbench_*.jsonl")) if given is None else given
    newest = {predictions.task_of_samples(f): f for f in found}
    if not newest:
        raise UserError(f"{folder} holds no samples_kv_longbench_*.jsonl; run lm-eval with --log_samples")
    made = []
    for task, file in newest.items():
        dataset, e = predictions.dataset_of(task)
        out = folder / ("pred_e" if e else "pred")
        predictions.write(out / f"{dataset}.jsonl", predictions.from_samples(file))
        made += [out] if out not in made else []
    return made


def score_folder(folder: Path, e: bool, extra: bool = False) -> dict[str, Any]:
    """Scores every <dataset>.jsonl of a folder and writes result.json and averages.json there."""
    found = sorted(folder.glob("*.jsonl"))
    if not found:
        raise UserError(f"{folder} holds no <dataset>.jsonl")
    scores: dict[str, Any] = {}
    extras: dict[str, dict[str, Any]] = {}
    for file in found:
        spec = _spec(file)
        rows = predictions.read(file)
        score = predictions.dataset_score_e if e else predictions.dataset_score
        scores[spec.dataset] = score(spec, rows)
        for metric in spec.extra_metrics if extra else ():
            extras.setdefault(metric, {})[spec.dataset] = score(spec, rows, metric)
    files.write_whole(folder / "result.json", json.dumps(scores, ensure_ascii=False, indent=4))
    document = report.collect({} if e else scores, scores if e else {}, {})
    if extras:
        document["extra"] = extras
    files.write_json(folder / "averages.json", document)
    return document


def _spec(file: Path) -> Spec:
    name = file.name.split(".")[0]
    known = official()
    if name not in known:
        raise UserError(f"{file}: {name!r} is not a LongBench dataset{close_names(name, known)}; move the file away")
    return known[name]
