"""Choices and generated answers under both caches, against full forwards, other runs, and the answers themselves."""

from __future__ import annotations

import itertools
import random
import sqlite3

import numpy as np
import pytest
import tiny
from fidelity import references
from fidelity.references import pair64

from kv_lm_eval.engine import fidelity
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.divergence import Divergence
from kv_lm_eval.requests import generation, kept_answers
from kv_lm_eval.requests.beside import Beside
from kv_lm_eval.requests.samples import Choice, Text
from kv_lm_eval.stats import mcnemar

pytestmark = pytest.mark.filterwarnings("ignore")
SNAPKV = {"method": "snapkv", "max_capacity_prompt": 64, "window_size": 16}
METHODS = {
    "snapkv": {"method": "snapkv", "window_size": 4, "kernel_size": 3},
    "knorm": {"method": "knorm"},
    "adakv": {"method": "adakv", "window_size": 4},
    "pyramidkv": {"method": "pyramidkv", "window_size": 4},
    "keydiff": {"method": "keydiff"},
}


@pytest.mark.parametrize("seed", range(8))
def test_every_continuation_has_the_numbers_of_full_forwards_with_what_was_evicted_hidden(seed: int) -> None:
    draw = random.Random(seed)
    pair = pair64(draw.choice(["llama", "qwen3", "gpt_neox"]))
    settings = {**METHODS[draw.choice(sorted(METHODS))], "max_capacity_prompt": draw.randint(6, 20)}
    tail = draw.choice([0, 1, 5])
    contexts = [tiny.tokens(draw.randint(30, 60), seed=seed + b) for b in range(2)]
    continuations = [
        [tiny.tokens(draw.randint(1, 9), seed=b + 7 * i) for i in range(draw.randint(1, 3))] for b in (3, 4)
    ]
    scores, _, base, found = fidelity.continue_beside(
        pair.model, lambda: pair.cache(**settings), contexts, continuations, tail
    )
    for b, context in enumerate(contexts):
        for i, continuation in enumerate(continuations[b]):
            row = [*context, *continuation[:-1]]
            student = references.cut_once(pair, row, len(context) - tail, **settings)[len(context) - 1 :]
            teacher = references.stock_logits(pair.stock, row)[len(context) - 1 :]
            assert references.worst(found[b][i], references.loops(teacher, student, continuation)) < 1e-8
            assert base[b][i][0] == pytest.approx(float(found[b][i].base_log_probs.sum()))
            assert scores[b][i][0] == pytest.approx(float(found[b][i].log_probs.sum()))
    assert max(one.kl.max() for group in found for one in group) > 1e-3 or tail == 0


@pytest.mark.parametrize(
    "settings", [SNAPKV, {"method": "h2o", "max_capacity_prompt": 64}, {**SNAPKV, "question_in_prompt": False}]
)
def test_both_answers_are_the_greedy_ones_of_the_caches_that_gave_them(run, settings) -> None:
    """Fed as a continuation, an answer meets the cache that it was generated from: each is the likelier one there."""
    results = run("kv_quickstart_needle", limit=3, fidelity=True, **settings)
    parted = 0
    for sample in results["samples"]["kv_quickstart_needle"]:
        (found,) = sample["fidelity"]
        assert len(found["kl"]) == len(found["base_tokens"]) and len(found["own_kl"]) == len(found["tokens"])
        apart = found["first_divergence"]
        assert (apart is None) == (found["tokens"] == found["base_tokens"])
        if apart is not None and apart < min(len(found["tokens"]), len(found["base_tokens"])):
            # up to there both ways are one; there the caches disagree on what is likeliest
            assert found["kl"][: apart + 1] == pytest.approx(found["own_kl"][: apart + 1], rel=1e-2, abs=1e-6)
            assert found["tokens"][:apart] == found["base_tokens"][:apart]
            assert not found["same_top"][apart] and not found["own_same_top"][apart]
            assert found["own_nll"][apart] < found["nll"][apart]
            assert found["base_nll"][apart] < found["own_base_nll"][apart]
            assert all(found["same_top"][:apart])
            parted += 1
    assert parted


def test_the_full_cache_beside_itself_and_its_answers_are_those_of_a_run_without(run) -> None:
    beside = run("kv_quickstart_needle", limit=3, fidelity=True, method="full")
    alone = run("kv_quickstart_needle", limit=3, method="full")
    found = beside["fidelity"]["kv_quickstart_needle"]
    assert found["answers"]["identical"] == 1 and found["along_base"]["kl_max"] < 1e-9
    answers = [[s["resps"][0][0] for s in r["samples"]["kv_quickstart_needle"]] for r in (beside, alone)]
    bases = [s["fidelity"][0]["base"] for s in beside["samples"]["kv_quickstart_needle"]]
    assert answers[0] == answers[1] == bases
    assert "fidelity" not in alone and "fidelity" not in alone["samples"]["kv_quickstart_needle"][0]


@pytest.mark.parametrize("question_in_prompt", [True, False])
@pytest.mark.parametrize("task", ["kv_quickstart_needle", "kv_quickstart_choice"])
def test_scores_and_flips_are_those_of_two_runs(run, task, question_in_prompt) -> None:
    settings = SNAPKV if question_in_prompt else {**SNAPKV, "question_in_prompt": False}
    ours, full = run(task, limit=3, fidelity=True, **settings), run(task, limit=3, method="full")
    found = ours["fidelity"][task]
    for name, both in found["scores"].items():
        assert both["ours"] == pytest.approx(float(ours["results"][task][name]))
        assert both["base"] == pytest.approx(float(full["results"][task][name]))
        metric = name.split(",")[0]
        pairs = [[s[metric] for s in r["samples"][task]] for r in (full, ours)]
        lost = sum(b > o for b, o in zip(*pairs, strict=True))
        assert found["flips"][name]["right_to_wrong"] == lost
    if task == "kv_quickstart_choice":
        samples = [r["samples"][task] for r in (full, ours)]
        chosen = [[int(np.argmax([resp[0][0] for resp in s["resps"]])) for s in of_run] for of_run in samples]
        assert found["same_choice"] == np.mean(np.equal(*chosen))
        for theirs, sample in zip(*samples, strict=True):
            for resp, one in zip(theirs["resps"], sample["fidelity"], strict=True):
                assert one["base"] == (pytest.approx(resp[0][0], abs=1e-3), resp[0][1])
                assert -sum(one["base_nll"]) == pytest.approx(resp[0][0], abs=1e-3)
        assert "efficiency" not in ours["config"]["kv_stats"]  # it would be the time of two caches


@pytest.mark.parametrize("task", ["kv_quickstart_needle", "kv_quickstart_choice"])
def test_a_batch_gives_the_numbers_of_single_prompts(run, task) -> None:
    alone, together = (run(task, limit=3, fidelity=True, **SNAPKV, **more) for more in ({}, {"batch": 3}))
    for one, other in zip(alone["samples"][task], together["samples"][task], strict=True):
        for a, b in zip(one["fidelity"], other["fidelity"], strict=True):
            assert a["kl"] == pytest.approx(b["kl"], rel=1e-2, abs=1e-6)
            assert a.get("tokens") == b.get("tokens") and a.get("base_tokens") == b.get("base_tokens")


def test_the_full_caches_answers_are_asked_for_once_for_all_methods_and_kept(run, tmp_path, monkeypatch) -> None:
    cache, asked = str(tmp_path / "answers"), []
    original = generation._generate

    def noting(runs, prompts, *more):
        asked.extend(one.compression.method.name for one in runs for _ in prompts)
        return original(runs, prompts, *more)

    monkeypatch.setattr(generation, "_generate", noting)

    def ask(**settings):
        asked.clear()
        results = run.anew("kv_quickstart_needle", limit=2, use_cache=cache, fidelity=True, **settings)
        return results["fidelity"]["kv_quickstart_needle"], sorted(asked)

    first, made = ask(**SNAPKV)
    assert made == ["full", "full", "snapkv", "snapkv"]
    assert ask(**SNAPKV) == (first, [])  # from the cache, with all numbers
    other, made = ask(method="knorm", max_capacity_prompt=64)
    assert made == ["knorm", "knorm"]
    assert other["scores"]["exact_match,first_number"]["base"] == first["scores"]["exact_match,first_number"]["base"]
    assert ask(method="full")[1] == ["full", "full"]  # its own answers; the full cache's are known
    with sqlite3.connect(f"{cache}_rank0.db") as file:
        ((table,),) = file.execute("SELECT name FROM sqlite_master WHERE name LIKE 'kv_full%'").fetchall()
        file.execute(f'UPDATE "{table}" SET value = substr(value, 1, 9)')
    assert ask(method="knorm", max_capacity_prompt=48)[1] == ["full", "full", "knorm", "knorm"]


def test_sampling_and_searches_are_refused(run) -> None:
    from kv_lm_eval.model import KVCompressedLM

    lm = KVCompressedLM(pretrained="kv-tiny", device="cpu", fidelity=True, **SNAPKV)
    from lm_eval.api.instance import Instance

    for more, message in (
        ({"do_sample": True, "temperature": 1.0}, "do_sample=True"),
        ({"num_beams": 2}, "num_beams=2"),
    ):
        request = Instance("generate_until", {}, ("a b c", {"until": ["."], "max_gen_toks": 4, **more}), 0)
        with pytest.raises(UserError, match=message):
            lm.generate_until([request], disable_tqdm=True)


# ---------------------------------------------------------------------------------------------------- parts


def numbers(n: int) -> Divergence:
    return Divergence(*(np.random.default_rng(n).random(n).astype(np.float32) for _ in range(3)), np.arange(n) % 2 == 0)


def beside(tokens: list[int] | None = None, base_tokens: list[int] | None = None, base: object = "b") -> Beside:
    if tokens is None:
        return Beside(base, numbers(3), noise_floor={"chunking": 1e-12})
    ids = [np.array(x, dtype=np.int32) for x in (tokens, base_tokens)]
    return Beside(base, numbers(len(base_tokens)), numbers(len(tokens)), *ids)


def test_where_answers_part() -> None:
    assert beside([1, 2, 3], [1, 2, 3]).first_divergence is None and beside([1], [1]).identical
    assert beside([1, 2, 3], [1, 5, 3]).first_divergence == 1
    assert beside([4], [1, 5, 3]).first_divergence == 0
    assert beside([1, 2], [1, 2, 3]).first_divergence == 2 and beside([1, 2, 3], [1, 2]).first_divergence == 2


def test_answers_come_back_from_disk_with_every_bit_and_damaged_ones_do_not() -> None:
    for answer in (
        Text("x", beside=beside([1, 2], [1, 3, 4])),
        Choice((-2.5, True), beside=beside(base=(-3.25, False))),
    ):
        stored = kept_answers.encode(answer)
        back = kept_answers.decode(stored, "here")
        assert type(back) is type(answer) and back == answer
        assert back.beside.of_sample() == answer.beside.of_sample() and back.beside.base == answer.beside.base
        assert back.beside.along_base.kl.dtype == np.float32 and back.beside.noise_floor == answer.beside.noise_floor
        for wrong in (
            stored.replace('"tokens"', '"token"', 1),
            stored.replace(".kl", ".kk", 1),
            stored.replace("[3]", "[2]"),
        ):
            with pytest.raises(UserError, match="damaged"):
                kept_answers.decode(wrong, "here")


def test_mcnemars_p_is_the_share_of_coin_throws_at_least_as_uneven() -> None:
    for n in range(7):
        for lost in range(n + 1):
            base, ours = [True] * lost + [False] * (n - lost) + [True], [False] * lost + [True] * (n - lost) + [True]
            found = mcnemar.flips(base, ours)
            throws = [abs(2 * sum(t) - n) >= abs(2 * lost - n) for t in itertools.product((0, 1), repeat=n)]
            assert (found.documents, found.right_to_wrong, found.wrong_to_right) == (n + 1, lost, n - lost)
            assert found.p == pytest.approx(np.mean(throws))
