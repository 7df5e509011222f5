"""Models to be timed: speed depends on shapes and not on weights, so random ones do, and nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_lm_eval import files, tiny
from kv_lm_eval.errors import UserError, close_names

if TYPE_CHECKING:  # they take seconds, and a misspelt shape is told before
    import torch
    import transformers

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rope_theta": 5e5, "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
    },
    "pythia-2.8b": {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "rotary_pct": 0.25, "max_position_embeddings": 2048,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    },
    "tiny-26m": {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "tiny-1m": {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, device: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model with random weights, made on its device.

    Args:
        shape: a name of SHAPES, or the path of a transformers config.json.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            configuration(shape), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def pretrained_model(name: str, dtype: torch.dtype, device: str) -> transformers.PreTrainedModel:
    """A model with its weights: a hub name, a folder, or kv-tiny."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.resolve(name), dtype=dtype)
    return model.to(device).eval()  # type: ignore[arg-type]


def check(shape: str) -> dict[str, Any]:
    """The configuration of a shape.

    Raises:
        UserError: it is no known one and no transformers config.json.
    """
    path = Path(shape).expanduser()
    if shape not in SHAPES and not path.is_file():
        raise UserError(
            f"--random-weights {shape} is neither a known shape{close_names(shape, SHAPES)} nor the path of a "
            f"config.json. Known: {', '.join(SHAPES)}"
        )
    numbers: dict[str, Any] = SHAPES[shape] if shape in SHAPES else files.read_json(path, dict[str, Any])
    if "model_type" not in numbers:
        raise UserError(f"{shape} has no model_type: it must be a transformers config.json")
    return dict(numbers)


def configuration(shape: str) -> transformers.PretrainedConfig:
    """That of a known shape, or of a config.json."""
    import transformers

    return transformers.AutoConfig.for_model(**check(shape))
