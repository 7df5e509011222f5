"""On real weights: chat templates with a system prompt and few-shot turns as lm-eval's hf has them; LongBench rows."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import real_models as real
import torch
from lm_eval.tasks import TaskManager

from kv_lm_eval import plugin

pytestmark = pytest.mark.filterwarnings("ignore")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo", "Cuba": "Havana"}
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {train: TRAIN, test: TEST}}
training_split: train
fewshot_split: train
test_split: test
output_type: generate_until
doc_to_text: "What is the capital of {{country}}?"
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def evaluate(tmp_path: Path, model: str, name: str, **settings: Any) -> dict[str, Any]:
    rows = [json.dumps({"country": country, "capital": capital}) for country, capital in CAPITALS.items()]
    for file, part in {"TRAIN": rows[:3], "TEST": rows[3:]}.items():
        (tmp_path / file).write_text("\n".join(part))
    places = {file: str(tmp_path / file) for file in ("TRAIN", "TEST")}
    task = TASK.replace("TRAIN", places["TRAIN"]).replace("TEST", places["TEST"])
    (tmp_path / "capitals.yaml").write_text(task)
    gc.collect()
    found = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": real.folder(name), "dtype": "float32", **settings},
        tasks=["capitals"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        num_fewshot=2,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction="You answer with one word.",
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    return found


@pytest.mark.parametrize("name", real.CHAT)
def test_chat_turns_are_asked_and_answered_as_by_lm_evals_own_model(name: str, tmp_path: Path) -> None:
    theirs = evaluate(tmp_path, "hf", name)
    ours = evaluate(tmp_path, "kvcompressed", name, method="full")
    asked = [[sample["arguments"] for sample in found["samples"]["capitals"]] for found in (ours, theirs)]
    assert asked[0] == asked[1]
    said = [[sample["resps"] for sample in found["samples"]["capitals"]] for found in (ours, theirs)]
    assert said[0] == said[1]
    prompt = asked[0][0][0][0]
    assert prompt.count("<|im_start|>user") == 3 and "You answer with one word." in prompt
    assert all(len(answers[0][0]) > 3 for answers in said[0])
    kept = evaluate(tmp_path, "kvcompressed", name, method="snapkv", max_capacity_prompt=48, window_size=16)
    assert kept["config"]["kv_stats"]["compressed_share"] == 1


@pytest.mark.parametrize("name", real.CHAT)
def test_longbench_rows_with_the_chat_template_are_answered_as_by_a_plain_loop(name: str, tmp_path: Path) -> None:
    rows = real.DATA / "longbench" / "rows"
    if not (rows / "trec.jsonl").is_file():
        pytest.skip(f"LongBench rows may not be carried: KV_LM_EVAL_DATA names the folder that has them, not {rows}")
    for dataset in ("multifieldqa_en", "trec"):  # asked with the template and, as a few-shot task, without
        (tmp_path / f"{dataset}.jsonl").write_text((rows / f"{dataset}.jsonl").read_text().splitlines()[0] + "\n")
    tasks = ["kv_longbench_multifieldqa_en", "kv_longbench_trec"]
    settings = {"pretrained": real.folder(name), "dtype": "float32", "method": "full"}
    metadata = {**settings, "longbench_dir": str(tmp_path), "longbench_max_length": 400}
    with plugin.only_our_tasks():
        index = TaskManager(metadata=metadata)
    found = lm_eval.simple_evaluate(
        model="kvcompressed",
        model_args=settings,
        tasks=tasks,
        task_manager=index,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": 6},
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    gc.collect()
    model, tokenizer = real.stock(name), real.tokenizer(name)
    for task in tasks:
        (sample,) = found["samples"][task]
        prompt = sample["arguments"][0][0]
        assert ("<|im_start|>user" in prompt) == (task != "kv_longbench_trec")
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert 380 <= ids.shape[1] <= 450, "cut in the middle to 400 tokens, and the template's"
        start, stops = ids.shape[1], {tokenizer.eos_token_id}
        for _ in range(6):
            with torch.inference_mode():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) in stops:
                break
        expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        assert sample["resps"][0][0] == expected
