"""The three request types through lm-eval's model interface, on the embedded model."""

from __future__ import annotations

import json

import pytest
import tiny as tiny_models
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")

STORY = (
    "The harbour was quiet that morning and the boats lay still. The special magic number for harbour is 48213. "
    "Nobody had seen the ferry since the storm, and the gulls walked on the stones as if they owned them. "
)
METHODS = [
    {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8},
    {"method": "streaming_llm", "window_size": 28, "compress_every": 4},
    {"method": "knorm", "keep_ratio": 0.3},
    {"method": "h2o", "max_capacity_prompt": 32, "compress_every": 4},
    {"method": "tova", "max_capacity_prompt": 32},
    {"method": "random", "max_capacity_prompt": 32},
    {"method": "window", "window_size": 32, "compress_every": 4},
]


def request(kind: str, *args, task: str = "t") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(task, 0, 1))


def generations() -> list[Instance]:
    settings = {"until": ["\n"], "max_gen_toks": 8}
    return [
        request("generate_until", STORY * n + "The special magic number for harbour is", settings) for n in (1, 3, 2)
    ]


def choices() -> list[Instance]:
    out = [
        request("loglikelihood", STORY * n + "The number is", f" {c}") for n in (1, 3, 2) for c in (48213, 9, 51, 777)
    ]
    return [
        *out,
        request("loglikelihood", "", " The boats"),
        request("loglikelihood", "The gulls", " walked on the stones"),
    ]


def documents() -> list[Instance]:
    return [request("loglikelihood_rolling", STORY * n) for n in (1, 6, 3)]


def load(model: str, batch_size: int = 4, **args):
    defaults = {"pretrained": tiny.path() if model == "hf" else "kv-tiny", "dtype": "float32"}
    return get_model(model).create_from_arg_obj({**defaults, **args}, {"batch_size": batch_size, "device": "cpu"})


def answers(lm) -> tuple[list[str], list[tuple[float, bool]], list[float]]:
    return (
        lm.generate_until(generations(), disable_tqdm=True),
        lm.loglikelihood(choices(), disable_tqdm=True),
        lm.loglikelihood_rolling(documents(), disable_tqdm=True),
    )


@pytest.fixture(scope="module")
def stock():
    return answers(load("hf", max_length=256))


@pytest.mark.parametrize("method", ["full", "no_cache"])
def test_without_compression_every_answer_is_that_of_lm_evals_own_model(method, stock):
    """Documents are longer than max_length here, so lm-eval's windows are exercised too."""
    got = answers(load("kvcompressed", method=method, max_length=256))
    assert got[0] == stock[0]
    for (a, greedy_a), (b, greedy_b) in zip(got[1], stock[1], strict=True):
        assert a == pytest.approx(b, abs=1e-5 * max(1, abs(b)))
        assert greedy_a == greedy_b
    assert got[2] == pytest.approx(stock[2], rel=1e-6)


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: s["method"])
def test_batches_of_any_size_give_the_same_answers(settings):
    one, four = (answers(load("kvcompressed", **settings, batch_size=n)) for n in (1, 4))
    assert one[0] == four[0]
    assert [s for s, _ in one[1]] == pytest.approx([s for s, _ in four[1]], abs=2e-4)
    assert one[2] == pytest.approx(four[2], abs=5e-3)


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: s["method"])
def test_results_say_what_was_compressed(settings):
    lm = load("kvcompressed", **settings)
    answers(lm)
    info = lm.get_model_info()
    stats = info["kv_stats"]
    assert info["kv_compression"]["method"] == settings["method"]
    assert info["kv_compression"]["tail_tokens"] == 1
    assert {"torch", "transformers", "lm-eval", "kv-lm-eval"} == set(info["kv_versions"])
    assert stats["requests"] == 3 + 5 + 3  # contexts, not continuations, are what is prefilled
    assert 0 < stats["compressed_share"] <= 1
    assert 0 < stats["kept_fraction_mean"] < 1
    assert stats["kv_bytes_prefill_mean"] <= stats["kv_bytes_allocated_mean"]
    json.dumps(info, default=str)


def test_a_run_in_which_nothing_was_compressed_warns_with_the_reason(caplog):
    lm = load("kvcompressed", method="snapkv", max_capacity_prompt=1000)
    lm.loglikelihood(choices(), disable_tqdm=True)
    stats = lm.get_model_info()["kv_stats"]
    assert stats["compressed_share"] == 0
    assert "compression triggered in NONE of 5 requests" in caplog.text
    assert "max_capacity_prompt" in caplog.text


def test_one_token_continuations_feel_the_compression_only_with_a_tail(caplog):
    def scores(**settings):
        lm = load("kvcompressed", **settings)
        letters = [request("loglikelihood", STORY * 3 + "The answer is", f" {c}") for c in "ABCD"]
        return [s for s, _ in lm.loglikelihood(letters, disable_tqdm=True)]

    full = scores(method="full", tail_tokens=0)
    budget = {"method": "snapkv", "max_capacity_prompt": 24, "window_size": 8}
    assert scores(**budget, tail_tokens=0) == full
    assert "tail_tokens=0" in caplog.text
    assert max(abs(a - b) for a, b in zip(scores(**budget), full, strict=True)) > 1e-3


def test_overlong_prompts_stop_before_any_work_and_can_be_cut_on_request():
    lm = load("kvcompressed", method="full", max_length=64)
    with pytest.raises(UserError, match=r"3 of 3 prompts are longer .* 64 tokens .*overlong=truncate_left"):
        lm.generate_until(generations(), disable_tqdm=True)
    cut = load("kvcompressed", method="full", max_length=64, overlong="truncate_left")
    assert cut.generate_until(generations(), disable_tqdm=True) == load("hf", max_length=64).generate_until(
        generations(), disable_tqdm=True
    )


def test_an_empty_prompt_is_refused():
    lm = load("kvcompressed", method="full", add_bos_token=False)
    with pytest.raises(UserError, match="1 of 1 prompts are empty"):
        lm.generate_until([request("generate_until", "", {"until": ["\n"]})], disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "snapkv", "max_capacity_prompt": 64, "window_sise": 8},
            "unknown setting 'window_sise'.*'window_size'",
        ),
        ({"method": "snapkv", "max_capacity_prompt": 64, "atn_implementation": "x"}, "'attn_implementation'"),
        ({"method": "snapkvv"}, "did you mean 'snapkv'"),
        ({}, "which method"),
        ({"method": "full", "pretrained": "./no/such/folder"}, "there is no such folder"),
        ({"method": "full", "pretrained": "owner/no-such-model"}, "could not be loaded"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(settings, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        load("kvcompressed", **settings)


def test_sampling_stops_and_several_sequences_work_as_in_lm_eval():
    settings = {"until": ["48"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    lm = load("kvcompressed", method="snapkv", max_capacity_prompt=40, window_size=8)
    (answer,) = lm.generate_until([request("generate_until", STORY * 2 + "The special", settings)], disable_tqdm=True)
    assert isinstance(answer, str) and "48" not in answer
    beams = {"until": ["\n"], "max_gen_toks": 8, "num_beams": 3}
    assert lm.generate_until([request("generate_until", STORY * 2 + "The special", beams)], disable_tqdm=True)


@pytest.mark.parametrize("settings", [{"method": "full"}, METHODS[0], METHODS[4]], ids=lambda s: s["method"])
def test_sizes_do_not_depend_on_the_batch_size_although_batches_run_to_their_slowest_answer(settings):
    def stats(batch_size):
        lm = load("kvcompressed", batch_size=batch_size, **settings)
        answers(lm)
        mine = lm.get_model_info()["kv_stats"]
        mine.update(mine.pop("prompt_tokens"))
        mine.update(mine.pop("answer_tokens"))
        depend = ("kv_bytes_allocated_mean", "overhead_bytes_mean", "by_task", "efficiency")
        return {k: v for k, v in mine.items() if k not in depend}

    assert stats(1) == pytest.approx(stats(4))


def test_a_document_beyond_the_models_maximum_is_noted_where_positions_stay_true(caplog):
    load("kvcompressed", method="snapkv", max_capacity_prompt=40, max_length=128).loglikelihood_rolling(
        documents(), disable_tqdm=True
    )
    assert "passes the model's maximum of 128" in caplog.text
    caplog.clear()
    load(
        "kvcompressed", method="streaming_llm", window_size=36, compress_every=8, max_length=128
    ).loglikelihood_rolling(documents(), disable_tqdm=True)
    assert "passes the model's maximum" not in caplog.text


def test_learned_positions_cannot_be_streamed_beyond_their_end(tmp_path):
    model = tiny_models.build("gpt2", vocab_size=2048, n_positions=128)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
    lm = get_model("kvcompressed")(pretrained=model, tokenizer=tokenizer, method="knorm", max_capacity_prompt=40)
    with pytest.raises(UserError, match="passes the 128 positions that this model has learned"):
        lm.loglikelihood_rolling(documents(), disable_tqdm=True)
    assert lm.loglikelihood(choices()[:4], disable_tqdm=True)
