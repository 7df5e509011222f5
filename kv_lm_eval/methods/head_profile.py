"""The head profile: the type of every attention head of a model, as JSON that people can read and edit.

Written by scripts/analyze_heads.py, read by method=head_aware. So are the files that DuoAttention was published with:
full_attention_heads.tsv, a line a layer and a number a KV head, and config.json beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

FORMAT = "kv-lm-eval head profile 1"
TYPES = ("positional", "mixed", "gathering", "dead")


@dataclass(frozen=True)
class Head:
    """One query head.

    Attributes:
        type: one of TYPES.
        confidence: 0 to 1, how far the head is beyond the thresholds of its type.
        window: recent tokens that the classifier recommends, the query's own included; -1: all.
    """

    type: str
    confidence: float
    window: int


@dataclass(frozen=True)
class HeadProfile:
    """The heads of a model, by layer, and how they were told apart.

    Attributes:
        model: its name. num_kv_heads: KV heads of a layer; query heads g * H / K .. share one.
        classifier: thresholds used. text: what was read: tokens, chunk length, files.
        heads: by layer and query head.
        sha256: of the file, when read from one.
        sinks: first tokens that heads with a window keep, where the file says so.
        of_kv_heads: whether the heads are KV heads, of how many query heads each is not said.
    """

    model: str
    num_kv_heads: int
    classifier: dict[str, Any]
    text: dict[str, Any]
    heads: tuple[tuple[Head, ...], ...]
    sha256: str = field(default="", compare=False)
    sinks: int | None = None
    of_kv_heads: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.heads)

    @property
    def num_heads(self) -> int:
        return len(self.heads[0])

    def counts(self) -> dict[str, int]:
        """Heads of each type."""
        found = Counter(head.type for layer in self.heads for head in layer)
        return {kind: found[kind] for kind in TYPES}

    def save(self, path: Path) -> None:
        """Writes the JSON file, one line a head."""
        shape = {"num_layers": self.num_layers, "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        head = {"format": FORMAT, "model": self.model, **shape, "classifier": self.classifier, "text": self.text}
        layers = [",\n  ".join(json.dumps(asdict(h)) for h in layer) for layer in self.heads]
        body = "],\n [\n  ".join(layers)
        files.write_whole(path, json.dumps(head, indent=1)[:-2] + f',\n "heads": [\n [\n  {body}]\n ]\n}}\n')


class HeadEntry(TypedDict):
    """One query head in the file."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    type: Literal["positional", "mixed", "gathering", "dead"]
    confidence: Annotated[float, Field(ge=0, le=1)]
    window: int


class ProfileFile(TypedDict):
    """The JSON file."""

    format: Literal["kv-lm-eval head profile 1"]
    model: str
    num_layers: int
    num_heads: int
    num_kv_heads: Annotated[int, Field(ge=1)]
    classifier: dict[str, Any]
    text: dict[str, Any]
    heads: Annotated[list[Annotated[list[HeadEntry], Field(min_length=1)]], Field(min_length=1)]


def load(path: str | Path) -> HeadProfile:
    """The profile in a file.

    Raises:
        UserError: there is no such file, or it is not a head profile.
    """
    file = Path(path).expanduser()
    how = "python scripts/analyze_heads.py --model MODEL --text FILE writes one (docs/heads.md)"
    if not file.is_file():
        raise UserError(f"profile={path}: there is no such file ({file.resolve()}); {how}")
    try:
        data = files.read_json(file, ProfileFile)
        heads = tuple(tuple(Head(**one) for one in layer) for layer in data["heads"])
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        profile = HeadProfile(data["model"], data["num_kv_heads"], data["classifier"], data["text"], heads, digest)
        _check(profile, data, str(file))
    except UserError as error:
        raise UserError(f"profile={error}; {how}") from None
    return profile


DUO = "full_attention_heads.tsv"
HALF = 0.5  # the authors' threshold


class DuoConfig(TypedDict):
    """config.json beside a DuoAttention pattern: how it was trained, of which this is read."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    sink_size: Annotated[int, Field(ge=0)]
    recent_size: Annotated[int, Field(ge=1)]
    model_name: NotRequired[str]


def is_duo(path: str) -> bool:
    """Whether a path is of a DuoAttention pattern: its table, or the folder that holds it."""
    file = Path(path).expanduser()
    return file.suffix == ".tsv" or (file / DUO).is_file()


def load_duo(path: str, share: float | None) -> HeadProfile:
    """The profile that a DuoAttention pattern makes: retrieval heads ("gathering") keep everything, the others
    ("positional") the first sink_size and the last recent_size tokens.

    Args:
        share: of all heads, those with the smallest numbers have a window, the earlier ones where numbers are equal;
            None: those below one half.

    Raises:
        UserError: there is no such file, or it is not what DuoAttention writes.
    """
    file = Path(path).expanduser()
    file = file / DUO if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"profile={path}: there is no such file ({file.resolve()})")
    config_file = file.with_name("config.json")
    if not config_file.is_file():
        raise UserError(
            f"profile={path}: a DuoAttention pattern has its sink_size and recent_size in config.json beside it, and "
            f"there is none in {file.resolve().parent}"
        )
    try:
        config = files.read_json(config_file, DuoConfig)
    except UserError as error:
        raise UserError(f"profile={error}") from None
    numbers = [[_weight(cell, file, i) for cell in line.split("\t")] for i, line in _lines(file)]
    if not numbers or len({len(layer) for layer in numbers}) != 1:
        widths = sorted({len(layer) for layer in numbers})
        raise UserError(
            f"profile={file}: a DuoAttention pattern has as many numbers in each line, this one has {widths}"
        )
    flat = [min(max(x, 0.0), 1.0) for layer in numbers for x in layer]
    least = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    streams = {i for i in least if flat[i] < HALF} if share is None else set(least[: round(share * len(flat))])
    recent = config["recent_size"] + 1  # beside the query's own token
    kinds = [Head("positional", 1.0, recent) if i in streams else Head("gathering", 1.0, -1) for i in range(len(flat))]
    width = len(numbers[0])
    layers = tuple(tuple(kinds[at : at + width]) for at in range(0, len(kinds), width))
    digest = hashlib.sha256(file.read_bytes() + config_file.read_bytes()).hexdigest()
    name = config.get("model_name", "a model that its config.json does not name")
    return HeadProfile(name, width, {}, {}, layers, digest, config["sink_size"], of_kv_heads=True)


def _lines(file: Path) -> list[tuple[int, str]]:
    return [(i, line) for i, line in enumerate(files.read_text(file).splitlines(), 1) if line.strip()]


def _weight(cell: str, file: Path, line: int) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise UserError(
            f"profile={file}: line {line}: {cell.strip()!r} is no number; a DuoAttention pattern has one a KV head, "
            "with tabs between"
        )
    return number


def _check(profile: HeadProfile, data: ProfileFile, place: str) -> None:
    if {len(layer) for layer in profile.heads} != {data["num_heads"]}:
        raise UserError(f"{place}: heads: its layers do not all have num_heads={data['num_heads']} heads")
    if profile.num_layers != data["num_layers"]:
        raise UserError(
            f"{place}: num_layers: its layers are not as many as it says, {profile.num_layers} for {data['num_layers']}"
        )
    if profile.num_heads % profile.num_kv_heads:
        raise UserError(
            f"{place}: num_kv_heads: {profile.num_heads} query heads do not divide into {profile.num_kv_heads} KV heads"
        )
    for i, layer in enumerate(profile.heads):
        for j, head in enumerate(layer):
            if head.window < 1 and head.window != -1:
                raise UserError(f"{place}: heads.{i}.{j}.window: {head.window} is a window below 1, and not -1 (all)")
