"""Find the smallest cache that answers as well as the full one: budget, and the best window, kernel, block size, ...

Scores of the full cache and of a setting are compared document by document; all documents about one text (the depths
of a needle's filler, the questions on a passage) are one observation. A setting counts as good enough when its mean
loss is at most --tolerance with --confidence, over everything that was tried for any task; the test may be looked at
after any number of texts, so easy decisions take few. Budgets are bisected, variants of a budget are halved each time
the texts double (kv_lm_eval/experiments/search.py says why that is sound, and what it assumes).

Usage:
    kv-lm-eval tune --tasks kv_needle_magic,kv_needle_multikey \\
        --model_args pretrained=kv-tiny,dtype=float32,method=snapkv \\
        --budgets 32,64,128,192,256 --try window_size=8,16,32 --metadata \\
        '{"lengths":[512],"depths":[10,50,90],"samples_per_cell":100}'

With --loss kl (or same_top) the loss is how far the predictions are from the full cache's, on texts, choices or the
full cache's own answers, and what is sought are the fewest bytes, over eviction and quantisation:

    kv-lm-eval tune --tasks kv_fidelity_file --loss kl --tolerance 0.1 \\
        --metadata '{"text_files": "FOLDER"}' --budgets 64,128,256 \\
        --model_args pretrained=kv-tiny,dtype=float32,method=snapkv \\
        --try method=snapkv,tova --also method=quantized,nbits=8/4/2

A setting counts as within where the upper limit of its mean is (kv_lm_eval/stats/limits.py says of which losses the
limit holds); --largest 2 takes a text for no farther than 2 nats, which holds whatever the losses are and takes more
texts. Where none is shown to be within, the answer is how many texts it would take.

Output: per task, and for the mean over all tasks, a table of what was tried and the recommended --model_args, or "none
within tolerance". The last line printed is a JSON document; with --output_path DIR it is also DIR/tune.json, and the
scores are kept in DIR/scores.json (distances.json), so that the same search goes on after an interruption.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval import console, files, harness
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import search, tune_distance
from kv_lm_eval.experiments.run_point import versions
from kv_lm_eval.experiments.scores import Scores, Settings, spelled
from kv_lm_eval.stats import betting


def main(argv: Sequence[str] | None = None) -> int:
    """Search for each task and for all of them together; returns the exit status."""
    folders: list[Path] = []
    return console.command("tune", lambda: _tune(argv, folders), lambda: _kept(folders))


def _kept(folders: list[Path]) -> str:
    if not folders:
        return "Nothing of it is kept; with --output_path DIR the same command would go on where it was."
    kept = [str(f) for name in ("scores.json", "distances.json") if (f := folders[0] / name).is_file()]
    found = f"The scores so far are in {' and '.join(kept)}" if kept else "There were no scores yet"
    return f"{found}: the same command goes on from there."


def _tune(argv: Sequence[str] | None, folders: list[Path]) -> int:
    args = _parser().parse_args(argv)
    if args.output_path:
        files.check_folder(args.output_path, "--output_path")
        folders.append(args.output_path)
    document = tune(args)
    if args.output_path:
        files.write_json(args.output_path / "tune.json", document)
    print(json.dumps(document))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = console.Parser(prog="kv-lm-eval tune", description=__doc__)
    parser.add_argument("--model_args", required=True, help="as of lm_eval; with method=NAME, without a budget")
    parser.add_argument("--tasks", required=True, help="task names, with commas")
    parser.add_argument("--budgets", required=True, help="budgets to try, with commas")
    parser.add_argument("--budget_setting", default="max_capacity_prompt", help="or keep_ratio, window_size, ...")
    parser.add_argument(
        "--try",
        dest="axes",
        action="append",
        default=[],
        metavar="SETTING=A,B,C",
        help="also choose the best of these; may be repeated. Each doubles or triples the candidates, so that each "
        "needs stronger evidence",
    )
    parser.add_argument(
        "--loss", choices=("score", *tune_distance.NAMES), default="score", help="what may be lost (score)"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="method=NAME,SETTING=A/B/C",
        help="with --loss kl or same_top: settings of another method, may be repeated",
    )
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest mean loss that counts as equal (0.05)")
    parser.add_argument("--largest", type=float, help="with --loss kl or same_top: the most that a text counts")
    parser.add_argument("--confidence", type=float, default=0.95, help="that all answers hold (0.95)")
    parser.add_argument("--metric", help="a score of the samples (default: the first of each task)")
    parser.add_argument("--score_range", default="0,1", help="smallest and largest score of a sample (0,1)")
    parser.add_argument("--first_look", type=int, default=32, help="texts of the first round; then doubled (32)")
    parser.add_argument("--max_samples", type=int, help="documents per task at most (default: all)")
    parser.add_argument("--shuffle_seed", type=int, default=0, help="of the order in which documents are drawn")
    parser.add_argument("--metadata", type=str, default="{}", help="as of lm_eval, JSON")
    parser.add_argument("--batch_size", default=1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--num_fewshot", type=int, default=None)
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--include_path", default=None)
    parser.add_argument("--output_path", type=Path, help="folder for tune.json and the scores")
    return parser


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """All searches; returns what is printed as JSON."""
    if not 0 < args.tolerance < 1 or not 0.5 <= args.confidence < 1:
        raise UserError("--tolerance must lie in (0, 1) and --confidence in [0.5, 1)")
    if args.loss == "score" and (given := [n for n in ("also", "largest") if getattr(args, n)]):
        raise UserError(f"--{given[0]} goes with --loss kl or same_top: budgets are told apart by their bytes there")
    if args.largest is not None and not args.tolerance < args.largest:
        raise UserError(f"--largest {args.largest:g} must be above --tolerance {args.tolerance:g}")
    if args.loss != "score":
        harness.check_device(args.device)
        return tune_distance.tune(args)
    scores = Scores(args)
    harness.check_device(args.device)
    scale = scores.range[1] - scores.range[0]
    tolerance = args.tolerance / scale
    budgets, left_out = candidates(args, scores.base)
    for note in left_out:
        print(f"left out: {note}")
    number = sum(map(len, budgets))
    questions = [[task] for task in scores.order] + ([list(scores.order)] if len(scores.order) > 1 else [])
    alpha = search.alpha_of(budgets, args.confidence, len(questions))
    print(
        f"{number} candidates and {'1 answer' if len(questions) == 1 else f'{len(questions)} answers'}, each tested at "
        f"{100 * (1 - alpha):.4g} % so that all hold together at {100 * args.confidence:g} %"
    )
    answers = []
    for tasks in questions:
        name = tasks[0] if len(tasks) == 1 else "all tasks, their mean"
        weights = scores.weights(tasks)
        fewest = betting.fewest(tolerance, alpha, float(weights.mean()))
        print(f"{name}: {len(weights)} texts, of which it takes {fewest} where a candidate never loses")
        if len(weights) < fewest:
            print(
                f"\n{name}: {len(weights)} texts cannot show a loss of at most {args.tolerance}, whatever the scores; "
                f"give {fewest - len(weights)} more texts, a larger --tolerance, fewer candidates or less --confidence"
            )
            answers.append({"tasks": tasks, "model_args": None, "too_few_texts": len(weights), "needed": fewest})
            continue
        answer = search.search(
            budgets,
            partial(scores.losses, tasks),
            len(weights),
            tolerance,
            args.confidence,
            args.first_look,
            len(questions),
        )
        answers.append(_report(name, tasks, answer, scores, scale, args))
    return {"answers": answers, "runs": scores.runs, "samples_run": scores.samples_run, "versions": versions()}


def candidates(args: argparse.Namespace, base: Settings) -> tuple[list[list[Settings]], list[str]]:
    """Settings of each budget, smallest first; what the method refuses is left out, with the reason."""
    from lm_eval.utils import handle_arg_string

    from kv_lm_eval import config
    from kv_lm_eval.model import HFLM_KEYS

    axes = tune_distance.axes_of(args.axes)
    out: list[list[Settings]] = []
    left_out = []
    for budget in sorted(handle_arg_string(b) for b in args.budgets.split(",")):
        variants = []
        for values in itertools.product(*axes.values()):
            settings = {args.budget_setting: budget, **dict(zip(axes, values, strict=True))}
            try:
                config.parse({**base, **settings}, pass_through=HFLM_KEYS)
                variants.append(settings)
            except UserError as error:
                left_out.append(f"{spelled(settings)}: {error}")
        if variants:
            out.append(variants)
    if not out:
        raise UserError("no candidate is possible:\n" + "\n".join(left_out[:5]))
    return out, left_out


def _report(
    name: str,
    tasks: Sequence[str],
    answer: search.Answer[Settings],
    scores: Scores,
    scale: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Prints one search and returns it."""
    rows = []
    for verdict in answer.verdicts:
        seen = {task: [i for text in scores.order[task][: verdict.texts] for i in text] for task in tasks}
        full = np.mean([list(scores.of(scores.full, task, ids).values()) for task, ids in seen.items()])
        rows.append(
            {
                "candidate": spelled(verdict.candidate),
                "texts": verdict.texts,
                "documents": sum(map(len, seen.values())),
                "full": f"{full:.3f}",
                "score": f"{full - scale * verdict.mean_loss:.3f}",
                "loss": f"{scale * verdict.mean_loss:+.3f}",
                "at most": f"{scale * verdict.at_most:+.3f}",
                "decision": verdict.decision,
                "would take": "" if verdict.needed is None else f"{verdict.needed} texts",
            }
        )
    sure = f"{100 * args.confidence:g} % confidence"
    print(f"\n{name}: mean loss against the full cache at most {args.tolerance:g}, {sure}\n")
    print(console.table(rows))
    recommended = None
    if answer.best is not None:
        recommended = spelled({**scores.base, **answer.best.candidate})
        print(f"\nrecommended: --model_args {recommended}")
    elif any(v.decision == search.UNDECIDED for v in answer.verdicts):
        most = max(verdict.texts for verdict in answer.verdicts)
        needed = min((v.needed for v in answer.verdicts if v.needed is not None), default=None)
        more = "" if needed is None else f"; the nearest would take about {needed}, if the others are like these"
        print(f"\nnone within tolerance could be shown with {most} texts ('not shown' may still be){more}")
    else:
        print("\nnone within tolerance")
    return {
        "tasks": list(tasks),
        "model_args": recommended,
        "tolerance": args.tolerance,
        "confidence": args.confidence,
        "alpha_per_candidate": answer.alpha,
        "needed": None if recommended else min((v.needed for v in answer.verdicts if v.needed), default=None),
        "rows": rows,
    }
