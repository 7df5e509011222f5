"""--metadata and --model_args to what decides a prompt: protocol, tokenizer, length to keep, data folder.

lm-eval hands a task the model's arguments and --metadata in one mapping, and no model. So the tokenizer that cuts the
prompts is loaded here, from the names that the model is loaded from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from typing_extensions import TypedDict

from kv_lm_eval import files, tiny
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.tasks.model_length import cuts_long_prompts, load_arguments, model_max_length

from . import protocols
from .protocols import OFFICIAL_MAX_LENGTH, ROOM, Protocol


class Asked(TypedDict, total=False):
    """The keys of --metadata that are LongBench's own, and their types."""

    longbench_dir: str | None
    longbench_max_length: int | float | str | None
    longbench_chat_format: str | None
    longbench_extra_metrics: bool | int | str


OURS = tuple(Asked.__annotations__)
NO_TOKENIZER = (
    "LongBench cuts long prompts in the middle, by the model's own tokenizer, and {why}. Under another model class "
    'than kvcompressed or hf, name it: --metadata \'{{"tokenizer": "NAME", "longbench_max_length": TOKENS}}\'. To '
    'leave prompts uncut (scores of long samples are then not comparable): {{"longbench_max_length": "none"}}.'
)


@dataclass(frozen=True)
class Settings:
    """How prompts are made in this run.

    Args:
        protocol: a preset of protocols.py.
        model: the model's name, in which protocols look for a family.
        tokenizer: the model's; None leaves prompts uncut.
        max_length: prompt tokens kept; None leaves prompts uncut.
        model_max_length: where known, the model's own limit for prompt, template and answer.
        shrinks: whether a prompt that passes the model's limit with its template and answer is cut further, which
            holds only where nobody has asked for a length.
        max_length_from: what decided max_length, in words.
        data_dir: folder of jsonl files, or None for the hub.
        chat_format: text around the cut prompt, with {prompt} in it, for tasks that may have a chat template.
        extra_metrics: whether to compute the metrics that are not official.
    """

    protocol: Protocol
    model: str
    tokenizer: Any
    max_length: int | None
    model_max_length: int | None
    shrinks: bool
    max_length_from: str
    data_dir: str | None = None
    chat_format: str | None = None
    extra_metrics: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Settings:
        """Reads the mapping that lm-eval gives a task; keys of others are passed over.

        Raises:
            UserError: an unknown longbench_ key, no tokenizer, or no length to be found.
        """
        for key in metadata:
            if key.startswith("longbench_") and key not in OURS:
                raise UserError(f"unknown key {key!r} in --metadata{close_names(key, OURS)}; LongBench's are {OURS}")
        files.check({key: metadata[key] for key in OURS if key in metadata}, Asked, "--metadata")
        chat_format = metadata.get("longbench_chat_format")
        if chat_format is not None:
            _check_chat_format(chat_format)
        protocol = protocols.load(str(metadata.get("protocol", "official")))
        model = str(metadata.get("pretrained", metadata.get("model", "")))
        asked = metadata.get("longbench_max_length")
        uncut = cls(
            protocol=protocol,
            model=model,
            tokenizer=None,
            max_length=None,
            model_max_length=None,
            shrinks=False,
            max_length_from="asked: uncut",
            data_dir=metadata.get("longbench_dir"),
            chat_format=chat_format,
            extra_metrics=str(metadata.get("longbench_extra_metrics", False)).lower() in ("true", "1"),
        )
        if isinstance(asked, str) and asked.lower() == "none":
            return uncut
        tokenizer = _tokenizer(metadata)
        limit = model_max_length(metadata, tokenizer)
        length, source = _max_length(asked, protocol, model, limit)
        if asked is not None and limit is not None and length > limit and not cuts_long_prompts(metadata):
            raise UserError(
                f"longbench_max_length={length} passes the model's maximum of {limit} tokens, so that long prompts "
                "would be refused or lose their beginning; give less, or max_length=... in --model_args if the model "
                "can"
            )
        return replace(
            uncut,
            tokenizer=tokenizer,
            max_length=length,
            model_max_length=limit,
            shrinks=asked is None and protocol.max_length(model) is None,
            max_length_from=source,
        )


def _check_chat_format(chat_format: str) -> None:
    if "{prompt}" not in chat_format:
        raise UserError(f"longbench_chat_format={chat_format!r} has no {{prompt}}, which the prompt replaces")
    try:
        chat_format.format(prompt="")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"longbench_chat_format={chat_format!r}: braces other than {{prompt}} are written twice, {{{{ and }}}} "
            f"({type(error).__name__}: {error})"
        ) from None


def _max_length(asked: Any, protocol: Protocol, model: str, limit: int | None) -> tuple[int, str]:
    if asked is not None:
        try:
            length = int(float(asked))
            if isinstance(asked, bool) or length != float(asked):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"longbench_max_length={asked!r} is neither a number of tokens nor none") from None
        if length < 2:
            raise UserError(f"longbench_max_length={length} leaves no half of at least one token; give 2 or more")
        return length, "asked"
    own = protocol.max_length(model)
    if own is not None:
        return own, f"protocol {protocol.name}"
    if limit is None:
        raise UserError(NO_TOKENIZER.format(why="the model's maximum length is not known"))
    length = OFFICIAL_MAX_LENGTH.get(limit, limit - ROOM)
    if length < 2:
        raise UserError(
            f"the model takes {limit} tokens; less the {ROOM} that the official script leaves for answer and template, "
            "no prompt is left. Set the prompt's length: --metadata '{\"longbench_max_length\": TOKENS}'"
        )
    return length, f"model's maximum of {limit}"


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    given = metadata.get("tokenizer") or metadata.get("pretrained")
    if given is None:
        raise UserError(NO_TOKENIZER.format(why="neither pretrained= nor tokenizer= names one"))
    if not isinstance(given, str):
        if callable(given) and hasattr(given, "decode"):
            return given  # a loaded tokenizer, from Python
        given = str(getattr(given, "name_or_path", ""))
    try:
        return _load_tokenizer(tiny.resolve(given), metadata.get("use_fast_tokenizer", True), load_arguments(metadata))
    except Exception as error:  # whatever transformers and the hub raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(NO_TOKENIZER.format(why=f"{given!r} has none that loads ({reason})")) from error


@lru_cache(maxsize=4)
def _load_tokenizer(name: str, use_fast: bool, arguments: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, use_fast=use_fast, **dict(arguments))
