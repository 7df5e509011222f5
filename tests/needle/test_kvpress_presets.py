"""The leaderboard's presets on whole RULER rows: what they keep is what a second reading of kvpress's presses keeps.

The model is the embedded one in float64, so that nothing but real ties is left open: where scores are equal to 1e-9,
any of them may stay.
"""

from __future__ import annotations

import functools

import kvpress_scores
import numpy as np
import pytest
import tiny
import torch
import transformers
from test_ruler_kvpress import ROWS, tokenizer

from kv_lm_eval import config
from kv_lm_eval import tiny as embedded
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.tasks.needle.ruler import protocol

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = {"niah_single_1": 0.25, "vt": 0.5, "cwe": 0.75, "niah_single_2": 0.875}  # and the share that is removed
PRESSES = ["knorm", "keydiff", "lagkv", "snapkv", "streaming_llm", "tova", "cur", "observed_attention"]
QUERY_AWARE = "leaderboard/adakv_snapkv_query_aware"


@functools.cache
def model(ours: bool) -> transformers.PreTrainedModel:
    made = transformers.AutoModelForCausalLM.from_pretrained(embedded.path(), dtype=torch.float64).eval()
    if not ours:
        made.set_attn_implementation("eager")
    return made


@functools.cache
def facts():
    return tiny.wrap(model(True), tiny.compression(method="expected_attention", max_capacity_prompt=9))


def ids(task: str, compress_questions: bool = False) -> list[int]:
    row = next(row for row in ROWS if row["task"] == task)
    own = tokenizer("kv-tiny")
    return own.encode(protocol.parts(row, own, compress_questions)[0], add_special_tokens=False)


@functools.cache
@torch.inference_mode()
def layers(task: str, compress_questions: bool = False) -> list[kvpress_scores.Layer]:
    stock, row = model(False), ids(task, compress_questions)
    queries = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, args, out, i=i: queries.__setitem__(i, out[0]))
        for i, layer in enumerate(stock.model.layers)
    ]
    cache = transformers.DynamicCache(config=stock.config)
    out = stock(torch.tensor([row]), past_key_values=cache, output_attentions=True)
    for hook in hooks:
        hook.remove()
    heads, theta = stock.config.num_attention_heads, stock.config.rope_parameters["rope_theta"]
    return [
        kvpress_scores.Layer(
            held.keys[0].numpy(),
            held.values[0].numpy(),
            queries[i].unflatten(-1, (heads, -1)).transpose(0, 1).numpy(),
            out.attentions[i][0].numpy(),
            theta,
        )
        for i, held in enumerate(cache.layers)
    ]


def kept(task: str, removed: float, preset: str, compress_questions: bool = False, **more) -> list[list[set[int]]]:
    """Positions by layer and head that are left after the context."""
    compression, _, rest = config.parse({"preset": preset, "compression_ratio": removed, **more})
    assert not rest
    cache = make_cache(compression, facts())
    tiny.forward(model(True), cache, [ids(task, compress_questions)])
    heads = model(True).config.num_key_value_heads
    found = [[set(head) for head in tiny.kept(cache, layer)] for layer in range(len(cache.stores))]
    return [of_layer * (heads // len(of_layer)) for of_layer in found]


def compare(stays: set[int], scores: np.ndarray, number: int) -> int:
    """Checks one head; returns how many of the kept were left open by a tie."""
    assert len(stays) == number
    last = np.sort(scores)[::-1][number - 1]
    near = 1e-9 * max(1.0, abs(last))
    sure, open_ = set(np.flatnonzero(scores > last + near)), set(np.flatnonzero(np.abs(scores - last) <= near))
    assert sure <= stays <= sure | open_
    return len(stays) - len(sure)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("press", PRESSES)
def test_a_preset_keeps_what_the_press_keeps(press, task):
    removed, left_open = TASKS[task], 0
    got = kept(task, removed, f"leaderboard/{press}")
    number = kvpress_scores.n_kept(len(ids(task)), removed)
    for layer, heads in zip(layers(task), got, strict=True):
        score = getattr(kvpress_scores, press)
        scores = score(layer, number) if press == "streaming_llm" else score(layer)
        if press == "keydiff":
            scores = scores.astype(np.float32).astype(float)  # compared in float32 here, so that ties are ties
        left_open += sum(compare(stays, own, number) for stays, own in zip(heads, scores, strict=True))
    if press not in ("streaming_llm", "lagkv"):  # of which many scores are equal by rule
        assert left_open < 0.1 * number * len(got) * len(got[0])


def test_tovas_newest_token_stays_by_its_weight_where_the_preset_does_not_protect_it():
    task = "niah_single_2"
    newest, places = (
        len(ids(task)) - 1,
        [kept(task, TASKS[task], "leaderboard/tova", recent_protected=n) for n in (0, 1)],
    )
    free, protected = ([all(newest in head for head in heads) for heads in layers_of] for layers_of in places)
    assert all(protected) and not all(free)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("preset", ["leaderboard/expected_attention", QUERY_AWARE])
def test_heads_share_as_under_kvpresss_adakv(preset, task):
    removed, aware = TASKS[task], preset == QUERY_AWARE
    number = kvpress_scores.n_kept(len(ids(task, aware)), removed)
    score = kvpress_scores.snapkv if aware else kvpress_scores.expected_attention
    differ = 0
    for layer, heads in zip(layers(task, aware), kept(task, removed, preset, aware), strict=True):
        expected = kvpress_scores.adakv(score(layer), number)
        assert sum(map(len, heads)) == number * len(heads)
        differ += sum(len(a ^ b) for a, b in zip(heads, expected, strict=True))
    assert differ == 0


@pytest.mark.parametrize("task", TASKS)
def test_whole_chunks_stay_as_under_chunkkv(task):
    removed = TASKS[task]
    got = kept(task, removed, "leaderboard/chunkkv_query_aware", True)
    for layer, heads in zip(layers(task, True), got, strict=True):
        assert heads == [kvpress_scores.chunkkv(kvpress_scores.snapkv(layer), removed)] * len(heads)


def test_the_papers_shares_are_not_kvpresss():
    """head_budget=ada, which the leaderboard's rows were taken for."""
    task, removed = "vt", TASKS["vt"]
    number = kvpress_scores.n_kept(len(ids(task)), removed)
    expected = [kvpress_scores.adakv(kvpress_scores.expected_attention(layer), number) for layer in layers(task)]
    got = kept(task, removed, "leaderboard/expected_attention", head_budget="ada")
    assert [[len(head) for head in heads] for heads in got] != [[len(head) for head in heads] for heads in expected]
