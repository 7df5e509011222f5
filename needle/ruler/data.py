"""RULER's rows: from a folder or the hub's copy as kvpress has them, or generated; and the files generating needs."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from .. import borders, haystack
from . import generate, split, wordlists
from .settings import Asking, Settings
from .split import Row

REPOSITORY = "simonjegou/ruler"
QUESTIONS: dict[str, Callable[[Any], generate.Questions]] = {
    "squad": generate.questions_of_squad,
    "hotpotqa": generate.questions_of_hotpotqa,
}
Recipe = dict[str, Any]  # the section `ruler` of a task's YAML


class Lacking(UserError):
    """A task's data is not here; a group goes on without it, and names it."""


class OfRuler(TypedDict):
    """A line of RULER's own output; newer versions keep the beginning of the answer apart."""

    input: str
    outputs: list[str]
    answer_prefix: NotRequired[str]


def rows(name: str, recipe: Recipe, asking: Asking) -> Iterator[tuple[int, Row]]:
    """(length, row) of a task, of each length in turn.

    Raises:
        Lacking: the data is not here.
        UserError: a row that is none, a length that holds no prompt.
    """
    settings = asking.settings
    if settings.ruler_dir is None:
        streams = [_generated(name, recipe, length, asking) for length in settings.lengths]
    else:
        streams = [iter(_stored(name, length, settings.ruler_dir)) for length in settings.lengths]
    open_streams = list(zip(settings.lengths, streams, strict=True))
    while open_streams:
        for length, stream in list(open_streams):
            row = next(stream, None)
            if row is None:
                open_streams.remove((length, stream))
            else:
                yield length, row


def number_of_rows(name: str, recipe: Recipe, asking: Asking) -> int:
    """How many `rows` will yield."""
    settings = asking.settings
    if settings.ruler_dir is not None:
        return sum(len(_stored(name, length, settings.ruler_dir)) for length in settings.lengths)
    most = settings.ruler_samples
    if recipe["kind"] == "qa":
        most = min(most, len(_questions(recipe["data"], settings.ruler_json).asked))
    return most * len(settings.lengths)


# ---------------------------------------------------------------------------------------------- stored


@lru_cache(maxsize=32)
def _stored(name: str, length: int, where: str) -> tuple[Row, ...]:
    if where.startswith("hub"):
        return _of_hub(name, length, where)
    folder = Path(where).expanduser()
    files.check_is_folder(folder)
    found = _data_files(folder, length)
    if not found:
        raise UserError(
            f"ruler_dir={where}: no .parquet or .jsonl file of {length} tokens in {folder.resolve()}: they lie in a "
            f"folder {length}/ (as in {REPOSITORY}), or are {length}.jsonl"
        )
    mine = [row for file in found for row in _of_file(name, file)]
    if not mine:
        raise Lacking(f"has no row of {length} tokens in {folder}")
    return tuple(mine)


def _data_files(folder: Path, length: int) -> list[Path]:
    below = [folder / str(length), folder / "data" / str(length)]
    found = [file for one in below if one.is_dir() for file in sorted(one.rglob("*"))]
    found += [folder / f"{length}{ending}" for ending in (".parquet", ".jsonl")]
    return [file for file in found if file.suffix in (".parquet", ".jsonl") and file.is_file()]


def _of_file(name: str, file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(file, filters=[("task", "=", name)])
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{file} is no parquet file of RULER's rows: {str(error).splitlines()[0]}") from None
        for number, value in enumerate(table.to_pylist()):
            yield _checked(name, value, f"{file}, row {number} of {name}")
        return
    for number, value in files.read_jsonl(file, dict[str, Any]):
        place = f"{file}, line {number}"
        if "task" in value:
            if value["task"] == name:
                yield _checked(name, value, place)
        elif file.parent.name == name:  # RULER's own folders
            one = files.check({k: value[k] for k in OfRuler.__annotations__ if k in value}, OfRuler, place)
            yield _checked(name, split.row(name, one["input"] + one.get("answer_prefix", ""), one["outputs"]), place)


def _checked(name: str, value: Any, place: str) -> Row:
    row: Row = files.check({k: value[k] for k in Row.__annotations__ if k in value}, Row, place)
    if not row["answer"] or not row["context"]:
        raise UserError(f"{place}: answer and context must not be empty")
    if row["max_new_tokens"] != split.MAX_NEW_TOKENS[split.kind(name)]:
        raise UserError(
            f"{place}: max_new_tokens is {row['max_new_tokens']}, and RULER's for {name} is "
            f"{split.MAX_NEW_TOKENS[split.kind(name)]}: these rows are made for another protocol"
        )
    return row


def _of_hub(name: str, length: int, where: str) -> tuple[Row, ...]:
    revision = where.partition("@")[2]
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"ruler_dir={where}: name the commit of {REPOSITORY} that is meant, ruler_dir=hub@COMMIT with its 40 "
            f"digits (https://huggingface.co/datasets/{REPOSITORY}/commits/main): a branch may change under a result"
        )
    from datasets import load_dataset

    try:
        data = load_dataset(REPOSITORY, str(length), split="test", revision=revision)
    except Exception as error:  # whatever datasets and the hub raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"ruler_dir={where}: {length} tokens of {REPOSITORY} could not be loaded ({reason}); give a folder of its "
            "files"
        ) from error
    mine = data.filter(lambda task: task == name, input_columns="task")
    return tuple(_checked(name, value, f"{REPOSITORY}, row {i} of {name}") for i, value in enumerate(mine))


# ---------------------------------------------------------------------------------------------- generated


def _generated(name: str, recipe: Recipe, length: int, asking: Asking) -> Iterator[Row]:
    settings, count = asking.settings, asking.counter.count
    room = length - settings.reserved_tokens
    rng, seed = random.Random(settings.ruler_seed), settings.ruler_seed
    answer_tokens = split.MAX_NEW_TOKENS[split.kind(name)]
    made: Iterator[generate.Sample]
    most = settings.ruler_samples
    if recipe["kind"] == "fwe":
        made = generate.frequent_words(rng, seed, room, count)
    else:
        maker = _maker(recipe, rng, length, asking)
        made = generate.samples(maker, room, answer_tokens, count)
        if isinstance(maker, generate.Documents):
            most = min(most, len(maker.questions.asked))
    for _ in range(most):
        sample = next(made)
        yield split.row(name, sample.text, sample.outputs)


def _maker(recipe: Recipe, rng: random.Random, length: int, asking: Asking) -> generate.Maker:
    settings = asking.settings
    seed, rest = settings.ruler_seed, {k: v for k, v in recipe.items() if k != "kind"}
    match recipe["kind"]:
        case "niah":
            essay = essay_words(settings) if recipe["haystack"] == "essay" else ()
            pairs = _pairs(settings.ruler_words)
            return generate.Niah(rng, seed, length, pairs, essay=essay, sentences=sentences, **rest)
        case "vt":
            return generate.Variables(rng, np.random.RandomState(seed), asking.counter.count, 30)
        case "cwe":
            return generate.CommonWords(rng, seed, length, _words(settings.ruler_words, length, seed))
        case "qa":
            return generate.Documents(rng, seed, _questions(recipe["data"], settings.ruler_json))
    raise UserError(f"kind={recipe['kind']} is none of RULER's: niah, vt, cwe, fwe, qa")


def sentences(text: str) -> list[str]:
    """A text's sentences, without the white space between them."""
    begins = [*borders.sentences(text), len(text)]
    return [part for a, b in zip(begins, begins[1:], strict=False) if (part := text[a:b].strip())]


@lru_cache(maxsize=2)
def _lists(source: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Nouns, adjectives, verbs."""
    if source == "builtin":
        return wordlists.NOUNS, wordlists.ADJECTIVES, wordlists.VERBS
    try:
        from wonderwords import random_word
    except ImportError:
        raise UserError(
            "ruler_words=wonderwords: the package is not installed (pip install wonderwords); without it, leave the "
            "setting out for the words that come with this project"
        ) from None
    names = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")
    nouns, adjectives, verbs = (tuple(random_word._get_words_from_text_file(name)) for name in names)
    return nouns, adjectives, verbs


@lru_cache(maxsize=2)
def _pairs(source: str) -> tuple[str, ...]:
    nouns, adjectives, _ = _lists(source)
    return tuple(sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns}))


def _words(source: str, length: int, seed: int) -> list[str]:
    """cwe's words; the built-in lists are too short for long prompts and go on with coined ones."""
    words = sorted({word for of_kind in _lists(source) for word in of_kind})
    if source == "builtin":
        rng, known = random.Random(seed), set(words)
        while len(words) < length // 4:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))
            if word not in known:
                known.add(word)
                words.append(word)
    return words


def essay_words(settings: Settings) -> tuple[str, ...]:
    """The essays' words, from a folder of texts or RULER's own file.

    Raises:
        Lacking: neither is named or there.
    """
    if settings.haystack_dir is not None:
        return _essay_words(haystack.load_source("", settings.haystack_dir).text)
    return _essay_words(re.sub(r"\s+", " ", str(_json("PaulGrahamEssays.json", settings.ruler_json)["text"])))


@lru_cache(maxsize=2)
def _essay_words(text: str) -> tuple[str, ...]:
    return tuple(text.split(" "))


@lru_cache(maxsize=2)
def _questions(data: str, folder: str | None) -> generate.Questions:
    content = _json(f"{data}.json", folder)
    try:
        return QUESTIONS[data](content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}/{data}.json is not in the form of that data set ({type(error).__name__}: {error}): RULER reads "
            f"{FILES[f'{data}.json']}"
        ) from None


FILES = {  # RULER's names, and what they are copies of
    "PaulGrahamEssays.json": 'Paul Graham\'s essays as {"text": ...}, or give "haystack_dir", a folder of their texts',
    "squad.json": "SQuAD's dev-v2.0.json",
    "hotpotqa.json": "HotpotQA's hotpot_dev_distractor_v1.json",
}


def _json(name: str, folder: str | None) -> Any:
    if folder is None or not (Path(folder).expanduser() / name).is_file():
        where = (
            "name its folder in --metadata '{\"ruler_json\": FOLDER}'" if folder is None else f"it is not in {folder}"
        )
        raise Lacking(f"needs {name} ({FILES[name]}): {where}")
    return files.read_json(Path(folder).expanduser() / name)


def check(name: str, recipe: Recipe, asking: Asking) -> None:
    """Raises Lacking where a task's data is not here, or a length is too short for it, or too long for the model."""
    settings = asking.settings
    if settings.ruler_dir is not None:
        for length in settings.lengths:
            _stored(name, length, settings.ruler_dir)
        return
    if recipe["kind"] == "qa":
        _questions(recipe["data"], settings.ruler_json)
    if recipe.get("haystack") == "essay":
        essay_words(settings)
    over = max(settings.lengths) - settings.reserved_tokens + split.MAX_NEW_TOKENS["fwe"]
    if recipe["kind"] == "fwe" and asking.limit is not None and over > asking.limit:
        raise Lacking(
            f"its prompts alone fill {max(settings.lengths)} tokens, as officially, and with the answer's "
            f"{split.MAX_NEW_TOKENS['fwe']} pass the model's {asking.limit}: give shorter lengths, or "
            f'"reserved_tokens": {split.MAX_NEW_TOKENS["fwe"]}'
        )
    try:
        for length in settings.lengths:
            next(_generated(name, recipe, length, asking))
    except generate.DoesNotFit as error:
        raise Lacking(str(error)) from None
