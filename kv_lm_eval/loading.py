"""Loading that fails early and in one line: files are looked at before the weights, the model before the work.

A model folder that is not whole, or a hub that cannot be reached, is told at once and by its name; whatever else
stops transformers on the way is told in one line too. A model whose weights are not all there, or are not numbers,
would answer without a word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

log = logging.getLogger("lm_eval.models.kvcompressed")
# Each is one JSON object; transformers takes some of them for missing where they are damaged, and goes on without.
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer*.json", "vocab*", "*.model", "*.tiktoken", "tekken.json", "*.gguf")


def settle(arguments: dict[str, Any], own_attention: bool) -> None:
    """What our model takes of the arguments of lm-eval's constructor: its device is named, its attention may be ours.

    Args:
        own_attention: whether the model's own attention is replaced.

    Raises:
        UserError: a backend of models that are none of ours.
    """
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a fork after its first use is warned about
    arguments["device"] = arguments.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.pop("backend", "default") == "seq2seq":
        raise UserError("backend=seq2seq: only causal language models have the KV cache that is compressed here")
    if own_attention and arguments.get("attn_implementation") not in (None, "sdpa", "eager"):
        unused = arguments.pop("attn_implementation")
        log.warning("attn_implementation=%s is not used: kvcompressed brings its own attention", unused)


@contextmanager
def loading(pretrained: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Around lm-eval's constructor: checks what can be checked before, and tells what goes wrong inside in one line.

    Args:
        pretrained: a name or folder, or a loaded model. arguments: the others of lm-eval's constructor.

    Raises:
        UserError: the model cannot be loaded, with the reason.
    """
    import torch

    named = {"pretrained": pretrained, **{k: arguments.get(k) for k in ("tokenizer", "peft", "delta")}}
    named = {k: v for k, v in named.items() if isinstance(v, str) and v}
    for argument, name in named.items():
        _check_local(argument, name, arguments)
    try:
        with _without_waiting(named, arguments):
            yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"pretrained={_shown(pretrained)} could not be loaded: {_reason(error, named)}") from error


def _reason(error: Exception, named: dict[str, str]) -> str:
    """One line: the error's, or where it shows, what is behind it."""
    folders = [Path(name).expanduser() for key, name in named.items() if key in ("pretrained", "tokenizer")]
    folder = folders[-1] if folders else None
    if "tokenizer" in str(error) and folder is not None and folder.is_dir() and not _tokenizer_files(folder):
        return f"there are no tokenizer files in {folder}; add them, or give tokenizer=NAME"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says; one of the two is another model's"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"


def _tokenizer_files(folder: Path) -> list[Path]:
    return [
        file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.name != "tokenizer_config.json"
    ]


def _shown(pretrained: Any) -> str:
    return pretrained if isinstance(pretrained, str) else type(pretrained).__name__


# ---------------------------------------------------------------------------------------------------- before


def _check_local(argument: str, name: str, arguments: dict[str, Any]) -> None:
    """Raises UserError for a folder that is not whole; a name of the hub is left to the hub."""
    path = Path(name).expanduser()
    if path.is_file() and argument != "tokenizer":
        raise UserError(f"{argument}={name}: is a file; give the folder that it is in")
    if not path.is_dir():
        return
    folder = path / str(arguments.get("subfolder") or "") if argument != "peft" else path
    for one in JSON_FILES:
        if (folder / one).is_file():
            files.read_json(folder / one, dict[str, Any])
    if argument == "pretrained" and not arguments.get("gguf_file") and not (folder / "config.json").is_file():
        raise UserError(
            f"{argument}={name}: there is no config.json in {folder}, so it is no model; give a folder with "
            "config.json, weights and tokenizer files"
        )
    if argument != "tokenizer":
        for file in sorted(folder.glob("*.safetensors")):
            check_safetensors(file)
        for index in sorted(folder.glob("*.safetensors.index.json")):
            _check_shards(index)


def check_safetensors(file: Path) -> None:
    """Raises UserError where a file ends before what its header promises, or has no header."""
    size = file.stat().st_size
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is cut off" if size else "it is empty")
            header = json.loads(data.read(length))
            end = max((int(t["data_offsets"][1]) for k, t in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        reason = str(error) if "it" in str(error)[:3] else "its header is not one"
        raise UserError(f"{file} is no whole safetensors file: {reason}; get it again") from None
    if 8 + length + end != size:
        raise UserError(
            f"{file} is no whole safetensors file: it has {size:,} bytes and should have {8 + length + end:,}; get it "
            "again"
        )


def _check_shards(index: Path) -> None:
    shards = files.read_json(index, dict[str, Any]).get("weight_map", {})
    missing = sorted({str(s) for s in shards.values()} - {p.name for p in index.parent.iterdir()})
    missing = [shard for shard in missing if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(f"{index} names {len(missing)} files that are not there, such as {missing[0]}; get them again")


# ---------------------------------------------------------------------------------------------------- the hub


@cache
def hub_is_reachable() -> bool:
    """Whether the model hub answers at all; asked once, so that nobody waits for retries where there is no network."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of the HTTP client, which differs between versions: no name, no route, no answer
        return False
    return True


@contextmanager
def _without_waiting(named: dict[str, str], arguments: dict[str, Any]) -> Iterator[None]:
    """Inside, no hub is asked where none answers: each file would be tried six times, half a minute in all."""
    from huggingface_hub import constants, try_to_load_from_cache

    of_hub = {key: name for key, name in named.items() if not Path(name).expanduser().exists()}
    if not of_hub or constants.HF_HUB_OFFLINE or hub_is_reachable():
        yield
        return
    revision = str(arguments.get("revision") or "main")
    first = {"tokenizer": "tokenizer_config.json", "peft": "adapter_config.json"}
    for key, name in of_hub.items():
        file = first.get(key, "config.json")
        if not isinstance(try_to_load_from_cache(name, file, arguments.get("cache_dir"), revision), str):
            raise UserError(
                f"{key}={name}: {constants.ENDPOINT} cannot be reached, and the model is neither a folder here nor in "
                f"the cache ({constants.HF_HUB_CACHE}); connect, or give a folder"
            )
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


# ---------------------------------------------------------------------------------------------------- after


class WholeModels:
    """Stands for transformers' AutoModelForCausalLM and refuses a model of which weights are missing.

    transformers fills them with random numbers and goes on.
    """

    @staticmethod
    def from_pretrained(name: str, *args: Any, **kwargs: Any) -> Any:
        import transformers

        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(name, *args, output_loading_info=True, **kwargs)
        parameters = {key for key, _ in model.named_parameters()}
        if missing := sorted(set(info["missing_keys"]) & parameters):
            raise UserError(
                f"{name} has no weights for {len(missing)} of the model's {len(parameters)} parameters, such as "
                f"{missing[0]}; they would be random numbers. Its files do not fit its configuration, or some are "
                "missing"
            )
        return model


def check_loaded(model: Any, tokenizer: Any) -> dict[int, str]:
    """Refuses a model that says nothing of use, or whose tokenizer is another model's.

    Returns:
        added tokens that the model has no embedding for, by id: harmless until one is in a prompt.

    Raises:
        UserError: its logits are not numbers, because weights are not; or tokens of the vocabulary have no embedding.
    """
    without_embedding = _check_vocabulary(model, tokenizer)
    _check_finite(model)
    return without_embedding


def _check_vocabulary(model: Any, tokenizer: Any) -> dict[int, str]:
    rows = model.get_input_embeddings().num_embeddings
    beyond = {text: i for text, i in tokenizer.get_vocab().items() if i >= rows}
    added = set(getattr(tokenizer, "get_added_vocab", dict)())
    ordinary = sorted((i, text) for text, i in beyond.items() if text not in added)
    if ordinary:
        raise UserError(
            f"the tokenizer has {len(beyond)} tokens that the model has no embedding for, such as {ordinary[0][1]!r} "
            f"({ordinary[0][0]}, of {rows} embeddings): it belongs to another model. Give tokenizer=NAME"
        )
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        raise UserError(
            f"the padding token {tokenizer.pad_token!r} ({pad}) has no embedding (there are {rows}): it was added to "
            "the tokenizer alone. Resize the model's embeddings, or leave it out of the tokenizer"
        )
    return {i: text for text, i in beyond.items()}


def check_embeddings(ids: list[int], without: dict[int, str], text: str) -> None:
    """Raises UserError for a text with a token that `check_loaded` found no embedding for."""
    if without and (found := [i for i in ids if i in without]):
        raise UserError(
            f"a prompt holds the token {without[found[0]]!r} ({found[0]}), for which the model has no embedding; "
            f"resize the embeddings, or change the prompt: {text[:60]!r}"
        )


@contextmanager
def chat_template(tokenizer: Any) -> Iterator[None]:
    """Inside, a tokenizer without a chat template that is asked for it says so in one line."""
    try:
        yield
    except ValueError as error:
        if getattr(tokenizer, "chat_template", None):
            raise
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, as of a base model; leave out "
            "--apply_chat_template, or give tokenizer=NAME in --model_args with one that has"
        ) from error


def _check_finite(model: Any) -> None:
    import torch

    from kv_lm_eval.engine.forward import device_of

    rows = model.get_input_embeddings().num_embeddings
    ids = torch.arange(min(8, rows), device=device_of(model)).unsqueeze(0)
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # the work will tell what it cannot do
        return
    if not logits.isnan().any():
        return
    named = (name for name, p in model.named_parameters() if not p.is_meta and not torch.isfinite(p).all())
    if (name := next(named, None)) is not None:
        raise UserError(f"the model's weights are not all numbers: {name} holds NaN or infinity; get them again")
    raise UserError(
        f"the model's own logits are not numbers in {str(model.dtype).removeprefix('torch.')}, though its weights are; "
        "try dtype=float32 or bfloat16"
    )
