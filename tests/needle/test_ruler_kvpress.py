"""protocol=kvpress: what is fed and how it is scored, against a second reading of kvpress's rules."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import kvpress_reading
import pytest
import torch
import transformers

from kv_lm_eval import config, harness, plugin, presets, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.budget import Ratio
from kv_lm_eval.requests import boundaries
from kv_lm_eval.tasks.needle.ruler import protocol

pytestmark = pytest.mark.filterwarnings("ignore")
plugin.install()
REAL = Path(os.environ.get("KV_LM_EVAL_REAL", "/work/real")) / "smollm2-hf"
LINES = [json.loads(line) for line in kvpress_reading.GOLDEN.read_text(encoding="utf-8").splitlines()]
ROWS = [line["row"] for line in LINES]
LENGTH = 1024  # that the rows are filed under
BOARD = [name for name in presets.available() if name.startswith("leaderboard/")]


@functools.cache
def tokenizer(name: str):
    if name == "smollm2" and not (REAL / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer is not here: {REAL} (set KV_LM_EVAL_REAL to the folder that has it)")
    return transformers.AutoTokenizer.from_pretrained(tiny.path() if name == "kv-tiny" else REAL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The rows in the layout of simonjegou/ruler."""
    where = tmp_path_factory.mktemp("ruler")
    (where / str(LENGTH)).mkdir()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (where / str(LENGTH) / "test.jsonl").write_text(text, encoding="utf-8")
    return where


def load_tasks(names: list[str], **metadata):
    with harness.task_manager(names, None, metadata) as manager:
        return manager.load(names)["tasks"]


def test_the_golden_file_is_what_the_second_reading_gives():
    assert len(LINES) >= 40 and len({row["task"] for row in ROWS}) == 13
    from tokenizers import Tokenizer

    files = {"kv-tiny": Tokenizer.from_file(str(Path(tiny.path()) / "tokenizer.json"))}
    if (REAL / "tokenizer.json").is_file():
        files["smollm2"] = Tokenizer.from_file(str(REAL / "tokenizer.json"))
    for line in LINES:
        made = kvpress_reading.golden_line(line["row"], [text for text, _ in line["scored"]], files)
        assert made == {key: line[key] for key in made}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["kv-tiny", "smollm2"])
def test_context_and_question_ids_are_kvpresss(name, compressed, folder):
    """From the task's own requests, encoded as the model's run does."""
    own = tokenizer(name)
    lm = SimpleNamespace(
        tok_encode=lambda text, add_special_tokens: own.encode(text, add_special_tokens=add_special_tokens)
    )
    tasks = load_tasks(
        ["kv_ruler"],
        tokenizer=str(REAL) if name == "smollm2" else "kv-tiny",
        protocol="kvpress",
        compress_questions=compressed,
        ruler_dir=str(folder),
        lengths=[LENGTH],
    )
    key = f"{name}{', questions compressed' if compressed else ''}"
    expected = {(line["row"]["task"], line["row"]["context"]): line[key] for line in LINES}
    seen = 0
    for task in tasks.values():
        task.build_all_requests()
        for request in task.instances:
            parts = boundaries.apart(request.args[0], request.doc)
            ids = [lm.tok_encode(part, add_special_tokens=False) for part in parts]
            assert [kvpress_reading.digest(one) for one in ids] == expected[request.doc["task"], request.doc["context"]]
            (boundary,) = boundaries.find_all(
                [request], None, len, str, lambda text: own.encode(text, add_special_tokens=False)
            )
            assert boundary == boundaries.Boundary(len(ids[1]), False)
            assert request.args[1] == {"until": [], "do_sample": False, "max_gen_toks": request.doc["max_new_tokens"]}
            seen += 1
    assert seen == len(LINES)


def test_scores_are_kvpresss():
    scored = [(line["row"], text, expected) for line in LINES for text, expected in line["scored"]]
    for row, text, expected in scored:
        assert round(100 * protocol.score(row["task"], text, row["answer"]), 2) == expected
    assert {0.0, 100.0} < {expected for *_, expected in scored}
    # RULER's own scorer puts a line break in the place of a control character
    assert protocol.score("vt", "AB\x00C", ["ABC"]) == 1 and protocol.score("vt", "AB\x00C", ["ABC"], "\n") == 0


def test_a_context_of_number_signs_is_not_taken_for_the_separator():
    row = {**ROWS[0], "context": "#" * 50 + "\n####\n"}
    assert protocol.parts(row, tokenizer("smollm2"))[0] == kvpress_reading.SMOLLM2_HEAD + row["context"]


# ---------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", BOARD)
def test_presets_keep_as_many_pairs_as_kvpress(name):
    ratio = {} if "no_press" in name else {"compression_ratio": 0.1}
    for removed in (0.1, 0.25, 0.3, 0.5, 0.75, 0.875, 0.9):
        compression, engine, rest = config.parse({"preset": name, **{key: removed for key in ratio}})
        assert not rest and not engine.question_in_prompt
        if ratio and compression.heads.exact and not compression.heads.differ:
            assert isinstance(compression.budget, Ratio) and compression.schedule.compress_every == 0
            assert [compression.budget.share(n) for n in range(1, 5000, 7)] == [
                int(n * (1 - removed)) for n in range(1, 5000, 7)
            ]


def test_every_preset_says_what_it_is_and_tells_its_tasks_the_protocol():
    assert len(BOARD) >= 10
    for name in BOARD:
        preset = presets.load(name)
        assert preset["about"] and preset["row"] and preset["tasks"]["protocol"] == "kvpress"


def test_what_is_given_beside_a_preset_wins():
    compression, engine, _ = config.parse(
        {"preset": "leaderboard/snapkv", "compression_ratio": 0.5, "window_sizes": 16, "question_in_prompt": True}
    )
    assert compression.method.window_size == 16 and compression.method.kernel_size == 5 and engine.question_in_prompt
    nested = {"preset": "leaderboard/snapkv", "compression": {"kernel_size": 7, "keep_ratio": 0.5}}
    assert config.parse(nested)[0].method.kernel_size == 7
    assert (
        config.parse({"preset": "leaderboard/snapkv", "method": "snapkv", "keep_ratio": 0.5})[0].method.window_size
        == 64
    )


@pytest.mark.parametrize(
    "args, said",
    [
        ({"preset": "leaderboard/snapvk", "keep_ratio": 0.5}, "no preset.*did you mean 'leaderboard/snapkv'"),
        ({"preset": "../../etc/passwd"}, "no preset"),
        ({"preset": "leaderboard/snapkv", "method": "knorm", "keep_ratio": 0.5}, "method=knorm and preset="),
        ({"preset": "leaderboard/snapkv"}, "needs one budget"),
    ],
)
def test_presets_that_cannot_be_are_told_in_a_line(args, said):
    with pytest.raises(UserError, match=said) as error:
        config.parse(args)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- a whole run


def answer_by_hand(
    model, context: list[int], question: list[int], removed: float, most: int, ends: set[int]
) -> list[int]:
    """kvpress's pipeline under streaming_llm in plain transformers: prefill, cut, question, greedy steps."""
    cache = transformers.DynamicCache(config=model.config)
    model(torch.tensor([context]), past_key_values=cache)
    kept = int(len(context) * (1 - removed))
    places = torch.tensor([*range(4), *range(len(context) - kept + 4, len(context))])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, places], layer.values[:, :, places]
    position = torch.arange(len(context), len(context) + len(question))[None]
    logits = model(torch.tensor([question]), past_key_values=cache, position_ids=position).logits
    answer = [int(logits[0, -1].argmax())]
    while len(answer) < most and answer[-1] not in ends:
        place = torch.tensor([[len(context) + len(question) + len(answer) - 1]])
        logits = model(torch.tensor([answer[-1:]]), past_key_values=cache, position_ids=place).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("removed", [0.3, 0.9])
def test_answers_are_those_of_kvpresss_pipeline_written_by_hand(removed, folder, tmp_path):
    names = ["kv_ruler_vt", "kv_ruler_qa_1", "kv_ruler_niah_multikey_2"]
    run = harness.run(
        "kvcompressed",
        {
            "pretrained": "kv-tiny",
            "dtype": "float32",
            "preset": "leaderboard/streaming_llm",
            "compression_ratio": removed,
        },
        names,
        metadata={"ruler_dir": str(folder), "lengths": [LENGTH]},
        log_samples=True,
        limit=2,
        output_path=tmp_path,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)
    own, ends = tokenizer("kv-tiny"), {model.generation_config.eos_token_id}
    with torch.inference_mode():
        for name in names:
            for sample in run.results["samples"][name]:
                doc = sample["doc"]
                ids = [own.encode(part, add_special_tokens=False) for part in protocol.parts(doc, own)]
                by_hand = answer_by_hand(model, *ids, removed, doc["max_new_tokens"], ends)
                assert sample["resps"][0][0] == own.decode(by_hand, skip_special_tokens=True)
                (numbers,) = sample["efficiency"]
                assert numbers["prompt_tokens"] == len(ids[0]) + len(ids[1])
    stats = run.results["config"]["kv_stats"]["by_task"]["kv_ruler_vt"]
    assert 0.5 < stats["context_share"]["min"] <= stats["context_share"]["max"] < 1
    check_files(tmp_path, run, removed)


def test_a_context_that_is_next_to_nothing_stops_the_run(tmp_path):
    row = {**ROWS[0], "context": "x", "question": "Why? " * 200}
    (tmp_path / f"{LENGTH}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    args = {"pretrained": "kv-tiny", "preset": "leaderboard/snapkv", "compression_ratio": 0.5}
    metadata = {"ruler_dir": str(tmp_path), "lengths": [LENGTH]}
    with pytest.raises(UserError, match="at least 10% must stand before it"):
        harness.run("kvcompressed", args, [f"kv_ruler_{row['task']}"], metadata=metadata)


def check_files(where: Path, run, removed: float) -> None:
    """kvpress's files beside the results."""
    import csv

    import yaml

    (results,) = [file for file in run.written if file.suffix == ".json"]
    (config_file,) = where.rglob("config.yaml")
    name = config_file.parent.name
    assert name.startswith(f"ruler__{LENGTH}__kv-tiny__streaming_llm__{removed:.2f}__fraction0.")
    asked = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    assert asked["compression_ratio"] == removed and asked["press_name"] == "streaming_llm"
    metrics = json.loads((config_file.parent / "metrics.json").read_text(encoding="utf-8"))
    with (config_file.parent / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(metrics) == {"vt", "qa_1", "niah_multikey_2"} and len(rows) == 6
    for task, value in metrics.items():
        of_task = [
            kvpress_reading.score(task, r["predicted_answer"], eval(r["answer"])) for r in rows if r["task"] == task
        ]
        assert value["string_match"] == pytest.approx(sum(of_task) / len(of_task), abs=0.01)
        got = run.results["results"][f"kv_ruler_{task}"]["string_match,none"]
        assert value["string_match"] == pytest.approx(got, abs=0.01)
    assert "no mean of the 13: not run" in run.said and str(config_file.parent) in run.said
    assert results.is_file()
