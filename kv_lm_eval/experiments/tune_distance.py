"""`kv-lm-eval tune --loss kl`: the fewest bytes whose divergence from the full cache is within a tolerance.

Settings of all families, of eviction and of quantisation alike, are told apart by the bytes that a request keeps
(descent.py says how they are walked). What is compared is paired by itself: both caches are asked for the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kv_lm_eval import console
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import descent, search
from kv_lm_eval.experiments.descent import Step, Terms
from kv_lm_eval.experiments.distances import KL, Distances
from kv_lm_eval.experiments.run_point import versions
from kv_lm_eval.experiments.scores import Settings, only_of_the_model, spelled
from kv_lm_eval.stats import betting, limits

NAMES = {KL: "mean KL(full cache || setting), nats a token", "same_top": "share of tokens with another likeliest one"}


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """The search for each task; returns what is printed as JSON."""
    distances = Distances(args)
    found, left_out = families(args, distances.base)
    for note in left_out:
        print(f"left out: {note}")
    alpha = (1 - args.confidence) / (len(found) * len(distances.order))
    print(
        f"{sum(map(len, found))} settings of {len(found)} families, {len(distances.order)} answers; a family is left "
        f"at its first setting that is not shown to be within, each tested at {100 * (1 - alpha):.4g} %, so that all "
        f"hold together at {100 * args.confidence:g} %"
    )
    answers = [_answer(task, found, distances, alpha) for task in distances.order]
    return {"answers": answers, "runs": distances.runs, "samples_run": distances.samples_run, "versions": versions()}


def families(args: argparse.Namespace, base: Settings) -> tuple[list[list[Settings]], list[str]]:
    """Whole --model_args of each family's settings; what a method refuses is left out, with the reason.

    Raises:
        UserError: no setting is possible.
    """
    from lm_eval.utils import handle_arg_string

    from kv_lm_eval import config

    asked = []
    axes = axes_of(args.axes)
    for values in itertools.product(*axes.values()):
        more = dict(zip(axes, values, strict=True))
        budgets = map(handle_arg_string, args.budgets.split(","))
        asked.append([{**base, **more, args.budget_setting: budget} for budget in budgets])
    model = only_of_the_model(base)
    asked += [[{**model, **settings} for settings in _slashed(text)] for text in args.also]
    out, left_out = [], []
    for family in asked:
        held = []
        for settings in family:
            try:
                config.parse(settings, pass_through=_hflm_keys())
                held.append(settings)
            except UserError as error:
                left_out.append(f"{_told(settings, base)}: {error}")
        out += [held] if held else []
    if not out:
        raise UserError("no setting is possible: " + "; ".join(left_out[:3]))
    return out, left_out


def axes_of(given: Sequence[str]) -> dict[str, list[Any]]:
    """Values of each --try SETTING=A,B,C."""
    from lm_eval.utils import handle_arg_string

    axes: dict[str, list[Any]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--try {text}: give SETTING=A,B,C")
        axes[key] = [handle_arg_string(v) for v in values.split(",")]
    return axes


def _slashed(text: str) -> list[Settings]:
    """Of --also method=quantized,nbits=8/4/2: one mapping a value."""
    from lm_eval.utils import handle_arg_string

    parts = [part.partition("=") for part in text.split(",")]
    if "method" not in (key for key, _, _ in parts) or not all(equals and value for _, equals, value in parts):
        raise UserError(f"--also {text}: give method=NAME,SETTING=A/B/C, as in --model_args but for the slashes")
    choices = [[(key, handle_arg_string(value)) for value in values.split("/")] for key, _, values in parts]
    return [dict(pairs) for pairs in itertools.product(*choices)]


def _hflm_keys() -> Any:
    from kv_lm_eval.model import HFLM_KEYS

    return HFLM_KEYS


def _told(settings: Settings, base: Settings) -> str:
    return spelled({k: v for k, v in settings.items() if k == "method" or base.get(k) != v})


def _answer(task: str, found: Sequence[Sequence[Settings]], distances: Distances, alpha: float) -> dict[str, Any]:
    args, texts = distances.args, len(distances.order[task])
    head = f"{task}: {NAMES[args.loss]} at most {args.tolerance:g}, {100 * args.confidence:g} % confidence"
    least = limits.FEWEST if args.largest is None else betting.fewest(args.tolerance / args.largest, alpha)
    if texts < least:
        print(
            f"\n{head}\n\nrefused: {texts} texts, and it takes {least}, {least - texts} more, to speak of others; "
            "several documents about one text count as one"
        )
        return {"tasks": [task], "model_args": None, "texts": texts, "needed": least}
    sizes = {spelled(s): distances.bytes_of(task, s, 1) for family in found for s in family}

    def losses(settings: Settings, n: int) -> np.ndarray:
        return distances.losses(task, settings, n)

    limit = limits.upper_limit if args.largest is None else bet_on(args.largest)
    terms = Terms(texts, args.tolerance, alpha, max(args.first_look, limits.FEWEST), limit)
    steps: list[Step[Settings]] = []
    for family in found:
        steps += descent.descend(sorted(family, key=lambda s: -sizes[spelled(s)]), losses, terms)
    best = descent.smallest(steps, lambda s: distances.bytes_of(task, s, texts))
    rows = []
    for step in steps:
        seen = distances.losses(task, step.candidate, step.texts)
        rows.append(
            {
                "setting": _told(step.candidate, distances.base),
                "KiB": f"{distances.bytes_of(task, step.candidate, step.texts) / 1024:,.0f}",
                "texts": step.texts,
                "tokens": int(seen[:, 1].sum()),
                "mean": f"{step.mean:.4g}",
                "at most": f"{step.at_most:.4g}",
                "decision": step.decision,
                "would take": "" if step.needed is None else f"{step.needed} texts",
            }
        )
    print(f"\n{head}\n\n{console.table(rows)}")
    print(f"\n{_in_words(steps, best, distances.base)}")
    return {
        "tasks": [task],
        "model_args": None if best is None else spelled(best.candidate),
        "loss": args.loss,
        "tolerance": args.tolerance,
        "confidence": args.confidence,
        "alpha_per_family": alpha,
        "needed": _needed(steps) if best is None else None,
        "rows": rows,
    }


def bet_on(largest: float) -> descent.Limit:
    """The limit of betting.py, which holds for any losses and any number of texts if each counts `largest` at most."""

    def limit(losses: np.ndarray, alpha: float) -> float:
        sums, weights = losses.T
        clipped = np.minimum(sums / weights, largest) / largest
        shares = weights / weights.max()
        return largest * betting.upper_bound(np.stack([clipped * shares, shares], axis=1), alpha)

    return limit


def _needed(steps: Sequence[Step[Settings]]) -> int | None:
    return min((s.needed for s in steps if s.needed is not None), default=None)


def _in_words(steps: Sequence[Step[Settings]], best: Step[Settings] | None, base: Settings) -> str:
    if best is not None:
        return f"recommended: --model_args {spelled(best.candidate)}"
    needed = _needed(steps)
    if needed is None:
        outside = all(s.decision == search.OUTSIDE for s in steps)
        return "none within tolerance" + ("" if outside else ": the means are above it, and more texts would not help")
    nearest = next(s for s in steps if s.needed == needed)
    return (
        f"refused: none is shown to be within. {_told(nearest.candidate, base)} would take about {needed} texts, "
        f"{needed - nearest.texts} more, if they are like these {nearest.texts}"
    )
