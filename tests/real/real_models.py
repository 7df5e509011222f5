"""Where real models lie (KV_REAL_MODELS), and their text; every test skips with a reason where one is missing."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from lm_eval.api.registry import get_model

from kv_lm_eval import plugin

plugin.install()

NAMES = ("smollm2", "gemma270", "qwen05")  # DIR/NAME-hf is an ordinary model folder
CHAT = ("smollm2", "qwen05")  # Gemma is a base model, without a chat template
DATA = Path(os.environ.get("KV_LM_EVAL_DATA", Path(__file__).parents[3] / "shared" / "data"))


def path(of: str) -> str:
    """DIR/`of`; skips the test where it is not."""
    if not (named := os.environ.get("KV_REAL_MODELS")):
        pytest.skip("real models: KV_REAL_MODELS names the folder that has smollm2-hf, gemma270-hf, qwen05-hf")
    if not (Path(named) / of).is_dir():
        pytest.skip(f"real models: {Path(named) / of} is not there")
    return str(Path(named) / of)


def folder(name: str) -> str:
    return path(f"{name}-hf")


def load(name: str, model: str = "kvcompressed", batch_size: int = 1, **settings: Any) -> Any:
    """lm-eval's model object; `hf` is lm-eval's own."""
    made = get_model(model)
    return made(pretrained=folder(name), dtype="float32", device="cpu", batch_size=batch_size, **settings)


def stock(name: str) -> tf.PreTrainedModel:
    """The model as transformers makes it."""
    return tf.AutoModelForCausalLM.from_pretrained(folder(name), dtype="float32").eval()


@functools.cache
def tokenizer(name: str) -> Any:
    return tf.AutoTokenizer.from_pretrained(folder(name))


@functools.cache
def prose() -> str:
    """Python's help, as running text."""
    from pydoc_data.topics import topics

    return " ".join(" ".join(topics[key] for key in ("assignment", "import", "try", "class", "with")).split())


def text(characters: int, start: int = 0) -> str:
    return prose()[start : start + characters]


def tokens(name: str, length: int, start: int = 0) -> list[int]:
    """Ids of ordinary text, without any special token."""
    return tokenizer(name)(prose()[start:], add_special_tokens=False)["input_ids"][:length]
