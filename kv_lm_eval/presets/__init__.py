"""Presets: settings under a name, `preset=leaderboard/snapkv` in --model_args.

Every YAML file in a folder below this one is one, and its name is its path without the ending; nothing else lists them.
A file says settings of --model_args (`model`) and may say what tasks are told (`tasks`), of which each task takes what
it knows. What is given beside a preset wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError, close_names

FOLDER = Path(__file__).parent
KEY = "preset"


class Preset(TypedDict):
    """A file's content.

    Attributes:
        about: what it is, in a sentence.
        model: settings of --model_args. tasks: keys of --metadata.
        row: the name that a leaderboard has for it. differs: in what it is not the same.
    """

    about: str
    model: dict[str, Any]
    tasks: NotRequired[dict[str, Any]]
    row: NotRequired[str]
    differs: NotRequired[str]


def available() -> list[str]:
    """Names of all presets."""
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml"))


@lru_cache(maxsize=64)
def load(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UserError: there is none.
    """
    if name not in available():
        raise UserError(
            f"there is no preset {name!r}{close_names(name, available())}; there are {', '.join(available())}"
        )
    preset: Preset = files.read_yaml(FOLDER / f"{name}.yaml", Preset)
    return preset


def named(args: Mapping[str, Any]) -> str | None:
    """The preset that --model_args name; None where `preset` is a setting of the method's own, which has no folder."""
    name = args.get(KEY)
    if name is None or ("/" not in str(name) and args.get("method") is not None):
        return None
    return str(name)


def of(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the preset named in --model_args says to the model and to tasks; nothing where none is named."""
    name = named(args)
    if name is None:
        return {}, {}
    preset = load(name)
    return dict(preset["model"]), dict(preset.get("tasks", {}))
