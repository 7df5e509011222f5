"""What decides an answer, as one hash: `--use_cache`, a sweep's resume, the tuner's scores and kept baselines use it.

By construction, not by a list of what matters: everything that reached the constructor, every file that it names, the
code that computes, the versions, and (once there is a model) what was loaded. Left out is only what stands in
`WITHOUT_EFFECT`, each with its reason; an argument that a later lm-eval adds is in from the start. A difference that
does not matter costs a second run, one that is missed costs a wrong number: so whatever cannot be read is taken to be
equal to nothing, not even to itself.

`before_loading` needs no weights; `of_loaded` is the same and what only a loaded model shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kv_lm_eval import __version__, tiny
from kv_lm_eval.contents import files_of
from kv_lm_eval.describe import Described, describe, digest, state, tokenizer
from kv_lm_eval.errors import UserError

_WHERE = "where the weights lie, not what they are"
_FROM = "where files come from: their contents count"
WITHOUT_EFFECT: dict[str, str] = {
    "device": "answers differ by rounding alone",
    "batch_size": "an answer does not depend on its neighbours",
    "max_batch_size": "an answer does not depend on its neighbours",
    **dict.fromkeys(("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "device_map"), _WHERE),
    **dict.fromkeys(("max_memory", "offload_buffers", "offload_state_dict", "low_cpu_mem_usage"), _WHERE),
    **dict.fromkeys(("cache_dir", "token", "force_download", "local_files_only"), _FROM),
}
PACKAGES = ("lm_eval", "transformers", "torch", "tokenizers", "peft", "accelerate", "safetensors")
# Of this package
COMPUTES = ("cache", "engine", "methods", "requests", "model.py", "config.py", "settings.py", "coerce.py")


def before_loading(model_args: Mapping[str, Any], model: str = "kvcompressed") -> dict[str, Described]:
    """What decides an answer and is known before a weight is loaded.

    Args:
        model_args: of lm-eval, as they stand in a configuration or on the command line. model: lm-eval's name of it.
    """
    arguments: dict[str, Any] = dict(model_args)
    if model == "kvcompressed":
        from kv_lm_eval import config

        try:
            compression, engine, rest = config.parse(arguments)
            arguments = {
                **rest,
                "settings": {**compression.settings(), **vars(engine)},
                "code": type(compression.method),
            }
        except UserError:  # told where the settings are checked
            pass
    return {"model": model, **_asked(arguments)}


def of_loaded(lm: Any) -> dict[str, Described]:
    """The same of a KVCompressedLM, with everything that was loaded."""
    arguments = {**lm.arguments, "settings": lm.settings, "code": type(lm.compression.method)}
    return {"model": "kvcompressed", **_asked(arguments), "loaded": _loaded(lm)}


def of_full_cache(lm: Any) -> dict[str, Described]:
    """What decides the full cache's answers to a prompt's tokens: the same for every method of a model."""
    return {"model": "kvcompressed", **_asked({**lm.arguments, "settings": {"method": "full"}}), "loaded": _loaded(lm)}


def _asked(arguments: Mapping[str, Any]) -> dict[str, Described]:
    """Arguments after lm-eval's defaults, with the contents of what they name; versions and code."""
    known = {**_defaults(), **arguments}
    if isinstance(known.get("pretrained"), str):
        known["pretrained"] = tiny.resolve(known["pretrained"])
    where: dict[str, Any] = {k: known.get(k) for k in ("revision", "cache_dir", "subfolder")}
    counted = {name: value for name, value in known.items() if name not in WITHOUT_EFFECT}
    return {
        "arguments": {name: describe(value, **where) for name, value in counted.items()},
        "code": our_code(),
        "versions": {"kv-lm-eval": __version__, **{name: _version(name) for name in PACKAGES}},
    }


@cache
def our_code() -> str:
    """Hash of what computes answers: a checkout changes under one version."""
    return digest(files_of([Path(__file__).parent / part for part in COMPUTES], only=".py"))


def _defaults() -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    parameters = inspect.signature(HFLM.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _loaded(lm: Any) -> dict[str, Described]:
    model, outer = lm.causal_lm, lm.model
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    return {
        "class": [describe(type(part)) for part in (outer, model)],
        "config": describe(model.config.to_dict(), False),
        "attention": str(model.config._attn_implementation),
        "generation_config": describe(model.generation_config.to_dict() if model.generation_config else None, False),
        "dtypes": dtypes,
        "adapters": describe({str(k): c.to_dict() for k, c in getattr(outer, "peft_config", {}).items()}, False),
        "tokenizer": tokenizer(lm.tokenizer),
        "lengths": [lm.max_length, lm.max_gen_toks],
        "prefix_token_id": lm.prefix_token_id,
        "chat_template_args": describe(lm.chat_template_args, False),
        "weights": None if isinstance(lm.pretrained, str) else state(outer),
    }
