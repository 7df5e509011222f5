"""Whatever settings are given: the run ends with finite answers and with what was asked for in its results, or before
any work in one line that says why. Never a traceback, never another setting than was written, never a full memory."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from settings.strings import draw

from kv_lm_eval import plugin
from kv_lm_eval.errors import UserError

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")

STORY = (
    "The harbour was quiet that morning and the boats lay still. The special magic number for harbour is 48213. "
    "Nobody had seen the ferry since the storm, and the gulls walked on the stones as if they owned them. "
)
QUESTION = "The special magic number for harbour is"
MOST_BYTES = 10**9


def requests() -> tuple[list[Instance], list[Instance], list[Instance]]:
    """A needle, a choice and a document, each short and longer."""

    def one(kind: str, *args: Any) -> Instance:
        doc = {"question": QUESTION}
        return Instance(request_type=kind, doc=doc, arguments=args, idx=0, metadata=("t", 0, 1))

    prompts = [STORY * n + QUESTION for n in (1, 2)]
    return (
        [one("generate_until", p, {"until": ["\n"], "max_gen_toks": 4}) for p in prompts],
        [one("loglikelihood", p, c) for p, c in itertools.product(prompts, (" 48213", " 9"))],
        [one("loglikelihood_rolling", STORY[:n]) for n in (40, 170)],
    )


def parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """--model_args as lm-eval's own command line reads them."""
    from lm_eval._cli import HarnessCLI

    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--tasks", "t", "--model_args", text])
    return dict(HarnessCLI().parse_args().model_args)


def evaluate(args: dict[str, Any]) -> str:
    """ "ran" or "refused"; anything else that is raised is a fault."""
    try:
        run(args)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), f"more than a line: {error}"
        return "refused"
    return "ran"


def run(args: dict[str, Any]) -> None:
    """All kinds of requests on the embedded model."""
    given = {"pretrained": "kv-tiny", "dtype": "float32", **args}
    lm = get_model("kvcompressed").create_from_arg_obj(given, {"batch_size": 2, "device": "cpu"})
    for name, value in args.items():
        assert taken(lm.settings.get(name), value) or name == "compression_ratio", f"{name}: {lm.settings.get(name)}"
    generate, choose, roll = requests()
    answers = lm.generate_until(generate, disable_tqdm=True)
    scores = [score for score, _ in lm.loglikelihood(choose, disable_tqdm=True)]
    scores += lm.loglikelihood_rolling(roll, disable_tqdm=True)
    assert len(answers) == 2 and all(map(math.isfinite, scores)) and max(scores) < 0, scores
    json.dumps(lm.get_model_info()["kv_stats"], allow_nan=False)


def taken(has: Any, value: Any) -> bool:
    """Whether a setting is what was written; what is switched off is not listed."""
    if has is None:
        return str(value).lower() in ("none", "0", "auto")
    if str(value).startswith("fp8"):  # other names of the same form, whose own settings say the rest
        return str(has).startswith("fp8")
    if has == ():
        return str(value) in ("", "[]", "()")
    return has == value or str(has) == str(value) or (isinstance(has, tuple) and [*has] == value)


LARGE = {  # what a number beyond all bounds could cost: memory for it, or a loop over it
    "kernel_size": "method=snapkv,max_capacity_prompt=24,window_size=4,kernel_size=N",
    "tail_tokens": "method=snapkv,max_capacity_prompt=24,window_size=4,tail_tokens=N",
    "merge_size": "method=h2o,max_capacity_prompt=24,evicted=cam,merge_size=N",
    "block_size": "method=snapkv_comp,max_capacity_prompt=24,window_size=4,block_size=N",
    "group_size": "method=quantized,group_size=N",
    "residual_length": "method=quantized,residual_length=N",
    "ring": "method=streaming_ring,max_capacity_prompt=N",
    "n_future_positions": "method=expected_attention,max_capacity_prompt=24,n_future_positions=N",
    "compress_every": "method=knorm,keep_ratio=0.9,prune_after=3,compress_every=N",
    "lag_size": "method=lagkv,max_capacity_prompt=24,lag_size=N",
}


@pytest.mark.parametrize("number", [10**9 + 1, 2**31 - 1])
@pytest.mark.parametrize("name", LARGE)
def test_a_number_beyond_all_bounds_costs_nothing(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(parsed(LARGE[name].replace("N", str(number)), monkeypatch))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_BYTES / 1024


def check(
    seed: int, cases: int, record: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    logging.disable(logging.WARNING)
    rng, tally, failed = random.Random(seed), Counter[str](), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(cases):
        text = draw(rng)
        try:
            tally[evaluate(parsed(text, monkeypatch))] += 1
        except SystemExit as error:  # lm-eval's own parser: not NAME=VALUE at all
            assert error.code == 2
            tally["refused"] += 1
        except Exception as error:
            tally["failed"] += 1
            failed.append(f"{text}\n    {type(error).__name__}: {str(error)[:300]}")
    logging.disable(logging.NOTSET)
    record("random settings", dict(tally))
    assert not failed, "\n".join([f"{len(failed)} of {cases}:", *failed])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < MOST_BYTES, f"the process grew by {grown / 1e6:.0f} MB"
    return tally


@pytest.mark.parametrize("part", range(4))
def test_random_settings_run_or_are_refused_in_one_line(
    part: int, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = check(part, 50, record_property, monkeypatch)
    assert min(tally["ran"], tally["refused"]) >= 10, tally


@pytest.mark.deep
@pytest.mark.parametrize("part", range(20))
def test_many_more_random_settings(
    part: int, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(1000 + part, 100, record_property, monkeypatch)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("method=snapkv,max_capacity_prompt=24,window_size=4,layer_budget=pyramid,head_budget=ada", 0, []),
        ("method=knorm,max_capacity_prompt=1e90", 2, ["max_capacity_prompt=1e+90", "at most 2147483647"]),
        ("method=tova,max_capacity_prompt=24,head_budget=ada", 2, ["head_budget=ada has no effect"]),
    ],
)
def test_the_command_ends_with_an_answer_or_with_one_line(
    text: str, code: int, words: list[str], tmp_path: Path
) -> None:
    command = ["run", "--model", "kvcompressed", "--tasks", "kv_quickstart_choice", "--limit", "1", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "kv_lm_eval", *command, "--model_args", f"pretrained=kv-tiny,{text}"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr
