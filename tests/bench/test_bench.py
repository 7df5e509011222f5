"""The benchmark's own arithmetic, and that both scripts run and end in one JSON document. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as tf

from kv_lm_eval.bench import card, command, goals, growth, measure, shapes, timing
from kv_lm_eval.bench.live_bytes import LiveBytes
from kv_lm_eval.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = ["--random-weights", "tiny-1m", "--device", "cpu", "--threads", "1", "--prompt", "90"]


def script(name: str, *flags: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *SMALL, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_bench_writes_a_card_and_ends_in_json(tmp_path: Path) -> None:
    parts = "generation,decode,storage,prefill,memory,scoring,fidelity,one_prefill,shared_prefix"
    result = script(
        "bench.py", "--repeats", "2", "--warm-up", "1", "--capacity", "40", "--new-tokens", "4", "--slots", "40,64",
        "--lengths", "64,128", "--chunk", "32", "--document", "120", "--choices", "2", "--parts", parts,
        "--methods", "snapkv,h2o", "--output-dir", str(tmp_path),
    )  # fmt: skip
    (path,) = tmp_path.iterdir()
    assert path.name == f"tiny-1m_cpu_{result['date']}.md"
    text = path.read_text()
    for heading in (
        "Whole requests",
        "Decode step",
        "Prefill of 90",
        "Peak memory",
        "h2o",
        "one context of 22",
        "under many methods",
    ):
        assert heading in text
    assert "N/A" in text, "a CPU does not know its peak memory"
    assert "nan" not in text.lower().replace("scanning", "")
    entries = result["generation"]["entries"]
    assert entries["full"]["kv_bytes"] == (90 + 4 - 1) * result["model"]["kv_bytes_per_token"]
    assert entries["streaming_ring"]["kv_bytes"] == 40 * result["model"]["kv_bytes_per_token"]
    forms = {name: e["kv_bytes"] for name, e in result["storage"]["entries"].items()}
    pairs = 90 + 16 * 3  # the rounds' steps
    assert forms["full"] == pairs * result["model"]["kv_bytes_per_token"]
    assert forms["kv_cache_dtype=fp8"] == forms["full"] // 4 + 2 * 2 * 2 * 4, "a byte a number, a scale a head"
    assert forms["kv_cache_dtype=turboquant"] == pairs * 2 * 2 * 2 * (32 // 2 + 2)
    assert set(result["prefill"]["entries"]) == {"full", "snapkv", "h2o"}
    assert all(e["n"] == 2 for e in result["prefill"]["entries"].values())


def test_profiling_splits_prefill_cut_and_decode(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = script(
        "profiling.py", "--method", "h2o", "--set", "max_capacity_prompt=40", "--new-tokens", "3", "--trace", str(trace)
    )
    assert all(result["split"][name] > 0 for name in ("prefill_ms", "prefill_cut_ms", "decode_ms", "decode_cut_ms"))
    assert any(o["name"].startswith("aten::") for o in result["operators"])
    assert json.loads(trace.read_text())["traceEvents"]
    once = script("profiling.py", "--method", "snapkv", "--max-capacity-prompt", "40", "--new-tokens", "3")
    assert once["split"]["decode_cut_ms"] == 0, "nothing is cut after the prefill"


def test_the_static_card_counts_what_a_step_reads() -> None:
    model = shapes.random_model("tiny-1m", torch.bfloat16, "cpu")
    numbers = card.static(model, 1e9)
    per_layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128
    assert numbers["parameters"] == 2 * per_layer + 2 * 1024 * 128 + 128
    assert numbers["weight_bytes"] == 2 * numbers["parameters"]
    assert numbers["weight_bytes_read_per_step"] == 2 * (numbers["parameters"] - 1024 * 128)
    assert numbers["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2  # keys and values, layers, KV heads, head size, bytes
    expected = (numbers["weight_bytes_read_per_step"] + 100 * numbers["kv_bytes_per_token"]) / 1e9
    assert card.floor_s(numbers, 100) == pytest.approx(expected)
    assert card.floor_s({**numbers, "bandwidth_bytes_per_s": None}, 100) is None


def test_known_shapes_are_those_of_the_models() -> None:
    """Parameter counts as their cards give them, from the configuration alone."""
    for name, billions in (("mistral-7b", 7.24), ("pythia-2.8b", 2.78), ("tiny-26m", 0.026)):
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(shapes.configuration(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_shape_may_be_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shapes.SHAPES["tiny-1m"]))
    assert shapes.random_model(str(path), torch.float32, "cpu").config.hidden_size == 128
    with pytest.raises(UserError, match="mistral-7b"):
        shapes.random_model("mistral-7", torch.float32, "cpu")


def test_live_bytes_counts_storages_and_not_views() -> None:
    before = torch.ones(1000)
    with LiveBytes([before]) as live:
        a = before + 1
        b = a.view(10, 100)
        del a
        assert live.now == 4000
        c = b * 2
        del b
        assert (live.now, live.peak) == (4000, 8000)
        c.add_(1)
    assert live.peak == 8000


def test_rounds_take_turns_and_leave_the_warm_up_out() -> None:
    order: list[str] = []
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.rounds(works, torch.device("cpu"), repeats=2, warm_up=1, per={"a": 1, "b": 10})
    assert order == ["a", "b"] * 3
    assert len(times["a"].wall_s) == len(times["b"].cpu_s) == 2
    times["b"].cpu_s, times["b"].wall_s = [10.0, 30.0], [20.0, 40.0]
    assert times["b"].record("cpu")["median"] == pytest.approx(2.0)
    assert times["b"].record("cpu")["wall_median"] == pytest.approx(3.0)


def test_methods_that_a_model_cannot_have_are_left_out() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=512)).eval()
    bench = measure.Bench.of(model, capacity=64)
    usable = bench.usable(["full", "snapkv", "streaming_llm", "expected_attention"])
    assert usable == ["full", "snapkv", "streaming_llm"], "positions are learned: keys cannot be moved"
    assert bench.new_cache("streaming_llm")().compression.moves_keys is None, "at the text's positions"


def test_a_model_of_windows_only_keeps_what_rotates_keys() -> None:
    """Its keys can be moved; it is sinks in the cache that its windows cut off."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 24}
    bench = measure.Bench.of(tf.MistralForCausalLM(tf.MistralConfig(**sizes, **heads)).eval(), capacity=64)
    assert bench.movable and not bench.in_cache
    assert bench.usable(["streaming_llm", "expected_attention"]) == ["streaming_llm", "expected_attention"]
    assert bench.new_cache("streaming_llm")().compression.moves_keys is None


def test_slopes_and_the_bend_of_what_is_known() -> None:
    at = {str(n): {"seconds": 3e-3 * n + 1e-6 * n * n, "bytes": 7.0 * n} for n in (1024, 4096, 16384)}
    found = growth.slopes(at)
    assert found["bend"] == 3000 and found["bytes_slope"] == pytest.approx(1)
    assert 1.5 < found["seconds_slope"] < 2
    line = growth.slopes({str(n): {"seconds": 2.0 * n, "bytes": 1.0} for n in (10, 20)})
    assert line == {"seconds_slope": pytest.approx(1), "bytes_slope": 0, "bend": None}


def test_growth_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    flags = ("--growth", "--growth-lengths", "64,128", "--chunk", "32", "--capacity", "40", "--output-dir")
    result = script("bench.py", *flags, str(tmp_path))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".md", ".png"]
    assert set(result["growth"]["entries"]) == set(growth.WHY)
    assert "slope, time" in next(tmp_path.glob("*.md")).read_text()


def test_goals_stand_beside_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that would be compiled are not: that takes seconds."""
    monkeypatch.setattr(goals, "Decoder", partial(goals.Decoder, backend=None))
    monkeypatch.setattr(goals, "STEPS", 2)
    model = shapes.random_model("tiny-1m", torch.float32, "cpu")
    part = goals.goals(measure.Bench.of(model, capacity=300), (400, 500))
    names = [ratio["name"] for ratio in part["ratios"]]
    assert len(names) == len(set(names)) == 1 + 1 + 5 + 4 + 2 * 7
    assert all(ratio["measured"] > 0 and ratio["goal"] > 0 for ratio in part["ratios"])
    text = "\n".join(card._goals({"ratios": [{"name": "a", "goal": 0.03, "measured": 0.04}, *part["ratios"]]}, {}))
    assert "| a | <= 3.0 % | 4.0 % | no |" in text and "| <= 1.10x |" in text


def test_a_model_whose_keys_cannot_be_moved_has_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming methods with the text's positions, scorers that turn keys left out."""
    monkeypatch.setattr(goals, "Decoder", partial(goals.Decoder, backend=None))
    monkeypatch.setattr(goals, "STEPS", 2)
    shape = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 512}
    path = tmp_path / "learned.json"
    path.write_text(json.dumps({**shape, "bos_token_id": 1, "eos_token_id": 2}))
    parts = "generation,decode,prefill,memory,scoring,fidelity,one_prefill,shared_prefix,goals,growth"
    flags = f"--parts {parts} --capacity 48 --prompt 96 --new-tokens 4 --slots 64 --lengths 64 --chunk 32 --document 96"
    more = "--goal-lengths 64,96 --growth-lengths 64,96 --threads 1 --warm-up 0 --repeats 1 --choices 2 --output-dir"
    given = ["--random-weights", str(path), "--device", "cpu", *flags.split(), *more.split(), ""]
    args = command.arguments().parse_args(given)
    command._check(args)
    result = command.run(args, given)
    assert not result["in_cache"] and "positions=absolute" in card.markdown(result)
    assert "streaming_llm" in json.dumps(result["decode"])
    assert "expected_attention" not in result["prefill"]["entries"]
    assert set(result["growth"]["entries"]) == set(growth.WHY)
