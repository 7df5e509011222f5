"""How many tokens the evaluated model takes, asked before a task writes its documents.

lm-eval hands a task --model_args and --metadata in one mapping, and no model. So the length is found as lm-eval's hf
model finds it, from the names that the model is loaded from; only configurations are read, never weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kv_lm_eval import tiny
from kv_lm_eval.errors import UserError

KEYS = ("n_positions", "max_position_embeddings", "n_ctx")  # as lm-eval's hf model asks a configuration
UNKNOWN = 10**9  # a tokenizer's model_max_length from here on says that nobody knows


def model_max_length(metadata: Mapping[str, Any], tokenizer: Any = None) -> int | None:
    """The model's maximum: asked for (max_length), configured, or the tokenizer's; None where nothing tells.

    Raises:
        UserError: max_length is not a number of tokens.
    """
    asked = metadata.get("max_length")
    if asked:
        try:
            length = int(float(asked))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"max_length={asked!r} is not a number of tokens") from None
        if length > 0:
            return length
    given = metadata.get("pretrained")
    if given is not None:
        config = getattr(given, "config", None) or _load_config(tiny.resolve(str(given)), load_arguments(metadata))
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        for key in KEYS:
            if configured := getattr(text_config, key, None) or getattr(config, key, None):
                return int(configured)
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit and limit < UNKNOWN else None


def load_arguments(metadata: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What of --model_args names the files that a tokenizer and a configuration are loaded from."""
    keys = ("revision", "subfolder", "gguf_file", "trust_remote_code")
    return tuple((key, metadata[key]) for key in keys if metadata.get(key))


def cuts_long_prompts(metadata: Mapping[str, Any]) -> bool:
    """Whether prompts beyond the model's maximum were asked to lose their beginning."""
    return metadata.get("overlong") == "truncate_left"


@lru_cache(maxsize=4)
def _load_config(name: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **dict(arguments))
    except (OSError, ValueError):
        return None
