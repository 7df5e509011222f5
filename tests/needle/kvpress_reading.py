"""kvpress's rules read a second time, with nothing of this project: what it feeds for a row, and its score.

Source: NVIDIA/kvpress 0.5.5, kvpress/pipeline.py (preprocess: template around context and separator, suffix after the
question, add_special_tokens=False for both), evaluation/evaluate.py (compress_questions) and
evaluation/benchmarks/ruler/calculate_metrics.py. Templates are written out by hand and the tokenizers' files are read
by the tokenizers package, so that neither transformers nor a template engine stands in between.

    python tests/needle/kvpress_reading.py     writes golden/ruler_kvpress.jsonl anew from the rows in it
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "ruler_kvpress.jsonl"
SMOLLM2_HEAD = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
AROUND = {  # before the context; between question and beginning of the answer
    "kv-tiny": ("<s>", "\n"),  # no template: BOS, and a line break
    "smollm2": (SMOLLM2_HEAD, "<|im_end|>\n<|im_start|>assistant\n"),
}


def fed(row: dict, name: str, tokenizer: Tokenizer, compress_questions: bool) -> tuple[list[int], list[int]]:
    """Context ids and question ids."""
    head, suffix = AROUND[name]
    context = row["context"] + (row["question"] if compress_questions else "")
    question = "" if compress_questions else row["question"]
    texts = (head + context, question + suffix + row["answer_prefix"])
    first, second = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    return first, second


def score(task: str, prediction: str, references: list[str]) -> float:
    """string_match of one row: in per cent, two decimals."""
    kept = "".join(character for character in prediction.strip() if ord(character) > 0x1F).strip()
    hits = 0
    for reference in references:
        if kept.lower().find(reference.lower()) >= 0:
            hits += 1
    share = min(hits, 1) if task[:2] == "qa" else hits / len(references)
    return round(share * 100, 2)


def digest(ids: list[int]) -> str:
    """Of a list of ids, with their number."""
    return f"{len(ids)} {hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:24]}"


def golden_line(row: dict, predictions: list[str], tokenizers: dict[str, Tokenizer]) -> dict:
    """A line of the golden file."""
    line = {"row": row, "scored": [[text, score(row["task"], text, row["answer"])] for text in predictions]}
    for name, tokenizer in tokenizers.items():
        for compressed in (False, True):
            key = f"{name}{', questions compressed' if compressed else ''}"
            line[key] = [digest(ids) for ids in fed(row, name, tokenizer, compressed)]
    return line


if __name__ == "__main__":
    folders = dict(zip(("kv-tiny", "smollm2"), sys.argv[1:3], strict=True))
    files = {name: Tokenizer.from_file(str(Path(folder) / "tokenizer.json")) for name, folder in folders.items()}
    lines = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    made = [golden_line(one["row"], [text for text, _ in one["scored"]], files) for one in lines]
    GOLDEN.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made), encoding="utf-8")
