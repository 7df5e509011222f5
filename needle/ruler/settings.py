"""--metadata and --model_args to what decides RULER's prompts: lengths, protocol, data, seed, words, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from kv_lm_eval import files, presets
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.tasks.model_length import cuts_long_prompts, model_max_length

from ..haystack import Counter
from ..tasks import MOST_GRID_TOKENS, MOST_TOKENS, Whole, counter_of

PROTOCOLS = {
    "official": "the prompt in one piece, a chat template where --apply_chat_template asks for it",
    "kvpress": "as NVIDIA/kvpress's leaderboard: its chat template, context and question tokenised apart",
}
WORDS = ("builtin", "wonderwords")


class Asked(TypedDict, total=False):
    """The keys of --metadata that are RULER's own, and their types; None, where it stands alone, is the default."""

    lengths: Whole | list[Whole]
    haystack_dir: str | None
    reserved_tokens: Whole
    ruler_dir: str | None
    ruler_json: str | None
    ruler_samples: Whole
    ruler_seed: Whole
    ruler_words: str
    compress_questions: bool


OWN = tuple(key for key in Asked.__annotations__ if key.startswith("ruler_"))


@dataclass(frozen=True)
class Settings:
    """How prompts are made in this run.

    Args:
        lengths: tokens of prompt and answer, each a configuration of the data.
        protocol: a name of PROTOCOLS.
        ruler_dir: rows instead of generated prompts: a folder, or "hub@COMMIT" of simonjegou/ruler; None: generated.
        ruler_json: folder with RULER's own files (PaulGrahamEssays.json, squad.json, hotpotqa.json).
        haystack_dir: folder of .txt and .md files to take for the essays.
        ruler_samples: generated prompts a task and length.
        ruler_seed: of the generator. ruler_words: where its words come from, one of WORDS.
        reserved_tokens: kept free in every generated prompt, for a chat template.
        compress_questions: protocol=kvpress: the question belongs to what is compressed (its query-aware rows).
    """

    lengths: tuple[int, ...] = (4096,)
    protocol: str = "official"
    ruler_dir: str | None = None
    ruler_json: str | None = None
    haystack_dir: str | None = None
    ruler_samples: int = 500
    ruler_seed: int = 42
    ruler_words: str = "builtin"
    reserved_tokens: int = 0
    compress_questions: bool = False

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            known = "; ".join(f"{name}: {what}" for name, what in PROTOCOLS.items())
            raise UserError(f"protocol={self.protocol}{close_names(self.protocol, PROTOCOLS)}; RULER's are {known}")
        if not self.lengths or min(self.lengths) < 1 or max(self.lengths) > MOST_TOKENS:
            raise UserError(
                f"lengths={list(self.lengths)}: give one or more numbers of tokens, each at least 1 and at most "
                f"{MOST_TOKENS:,}"
            )
        if len(set(self.lengths)) < len(self.lengths):
            raise UserError(f"lengths={list(self.lengths)} names a length twice")
        if self.ruler_words not in WORDS:
            raise UserError(f"ruler_words={self.ruler_words!r} is not one of: {', '.join(WORDS)}")
        if self.ruler_samples < 1 or self.ruler_samples * sum(self.lengths) > MOST_GRID_TOKENS:
            raise UserError(
                f"ruler_samples={self.ruler_samples} at lengths of {sum(self.lengths):,} tokens in all: give 1 or "
                f"more, and at most {MOST_GRID_TOKENS:,} tokens a task"
            )
        if self.reserved_tokens < 0:
            raise UserError(f"reserved_tokens={self.reserved_tokens} must be 0 or more")
        if self.compress_questions and self.protocol != "kvpress":
            raise UserError("compress_questions has no effect without protocol=kvpress, which it belongs to")


@dataclass(frozen=True)
class Asking:
    """The settings of a run with what they need of its model: the tokenizer's counter, and its maximum where known."""

    settings: Settings
    counter: Counter
    limit: int | None


def read(metadata: Mapping[str, Any]) -> Asking:
    """From the mapping that lm-eval gives a task; a preset's words for tasks are among them.

    Raises:
        UserError: an unknown ruler_ key, a value of the wrong type, no tokenizer, prompts beyond the model's maximum,
            or settings of the model under which a protocol would be another.
    """
    model, told = presets.of(metadata)
    metadata = {**model, **told, **metadata}
    for key in metadata:
        if key.startswith("ruler_") and key not in OWN:
            raise UserError(f"unknown key {key!r} in --metadata{close_names(key, OWN)}; RULER's are {', '.join(OWN)}")
    asked = {key: metadata[key] for key in Asked.__annotations__ if metadata.get(key) is not None}
    values: dict[str, Any] = files.check(asked, Asked, "--metadata")
    if "lengths" in values:
        values["lengths"] = tuple(values["lengths"]) if isinstance(values["lengths"], list) else (values["lengths"],)
    if metadata.get("protocol"):
        values["protocol"] = str(metadata["protocol"])
    settings = Settings(**values)
    _check_model(settings, metadata)
    counter = counter_of(metadata)
    limit = model_max_length(metadata, counter.tokenizer)
    if limit is not None and max(settings.lengths) > limit and not cuts_long_prompts(metadata):
        raise UserError(
            f"lengths={list(settings.lengths)}: this model takes {limit} tokens, prompt and answer together; give "
            "shorter ones, or max_length=... in --model_args if the model can"
        )
    return Asking(settings, counter, None if cuts_long_prompts(metadata) else limit)


def _check_model(settings: Settings, metadata: Mapping[str, Any]) -> None:
    method = metadata.get("method")
    if settings.protocol != "kvpress" or method in (None, "full", "no_cache"):
        return
    if str(metadata.get("question_in_prompt", True)).lower() not in ("false", "0"):
        raise UserError(
            "protocol=kvpress compresses a context before its question is seen: add question_in_prompt=False to "
            "--model_args, or take a preset (preset=leaderboard/NAME), which has it"
        )
