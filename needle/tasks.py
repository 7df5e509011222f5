"""The documents of the `kv_needle*` tasks, built when a task is loaded, with the tokenizer of the evaluated model.

A task is a recipe: from a stream of seeded draws to facts, a question and the strings expected in the answer. `_grid`
asks it for every length, depth and sample; haystack.py does the filling. lm-eval calls the builders with all of
--model_args and --metadata together; of the former only the tokenizer's names and add_bos_token are read, so that
every method is asked the same.

Reference: gkamradt/LLMTest_NeedleInAHaystack (classic needle, several facts), KVCache-Factory
run_needle_in_haystack.py (its prompt), RULER (arXiv:2404.06654; NVIDIA/RULER scripts/data/synthetic: wordings, numbers
of needles, tokens to generate, word counts).
Deviations: the depth of the first fact is asked for, not drawn; keys are common nouns, filler is any text, vt and cwe
have no worked example; the default wording ("plain") shares its words between statement and question. More in
needle/README.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any

import pydantic
from datasets import Dataset
from typing_extensions import TypedDict

from kv_lm_eval import files, tiny
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.tasks.model_length import cuts_long_prompts, model_max_length
from kv_lm_eval.tiny.episodes import KEYS, Draw

from . import haystack
from .haystack import Counter, Source, Window

ADJECTIVES = (
    "amber ancient arctic bitter bold brave bright calm careful clever cosmic curious daring eager early fancy "
    "fearless fragile gentle golden graceful happy hidden honest humble icy jolly keen late lively lucky mellow "
    "mighty modest noble patient polite proud quick quiet rapid rare royal rusty secret shiny silent simple smooth "
    "solid sturdy subtle sunny swift tender tidy tiny vivid warm wise witty wooden young zesty"
).split()
NEEDLES = "needles"  # as the haystack: other facts of the same kind, RULER's multikey_2 and 3
KINDS = {"numbers": "number", "words": "word", "uuids": "uuid"}


@dataclass(frozen=True)
class Settings:
    """What --metadata may say. A length counts the prompt and the room for the answer, as in RULER."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    samples_per_cell: int = 3
    haystack: str = haystack.PYTHON_HELP
    haystack_dir: str | None = None
    needle_seed: int = 0  # not "seed": that is a setting of method=random
    needle_type: str = "numbers"
    key_type: str = "words"
    num_keys: int = 4
    num_values: int = 4
    num_queries: int = 4
    wording: str = "plain"
    floor: bool = False
    reserved_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or max(self.lengths) > MOST_TOKENS:
            raise UserError(
                f"lengths={list(self.lengths)}: give one or more numbers of tokens, each at least 1 and at most "
                f"{MOST_TOKENS:,}"
            )
        if not self.depths or not all(0 <= d <= 100 for d in self.depths):
            raise UserError(f"depths={list(self.depths)}: give one or more per cents, 0 (beginning) to 100 (end)")
        for name in ("samples_per_cell", "num_keys", "num_values", "num_queries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
            if name != "samples_per_cell" and getattr(self, name) * LEAST_FACT_TOKENS > max(self.lengths):
                raise UserError(
                    f"{name}={getattr(self, name)}: so many facts do not fit into {max(self.lengths)} tokens; take "
                    "fewer, or longer prompts"
                )
        places = len(self.lengths) * len(self.depths) * self.samples_per_cell
        tokens = sum(self.lengths) * len(self.depths) * self.samples_per_cell
        if places > MOST_PROMPTS or tokens > MOST_GRID_TOKENS:
            raise UserError(
                f"{len(self.lengths)} lengths x {len(self.depths)} depths x samples_per_cell={self.samples_per_cell} "
                f"are {places:,} prompts of {tokens:,} tokens in all, which would be written before the first is "
                f"asked; at most {MOST_PROMPTS:,} prompts and {MOST_GRID_TOKENS:,} tokens are"
            )
        if self.reserved_tokens < 0:
            raise UserError(f"reserved_tokens={self.reserved_tokens} must be 0 or more")
        for name, allowed in (("needle_type", KINDS), ("key_type", ("words", "uuids")), ("wording", WORDINGS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of: {', '.join(allowed)}")


WORDINGS = ("plain", "paper")
MOST_TOKENS = 10_000_000  # of a prompt: the longest context that anybody claims
MOST_PROMPTS, MOST_GRID_TOKENS = 100_000, 1_000_000_000
LEAST_FACT_TOKENS = 4


def _whole(value: Any) -> Any:
    """A float without a fraction, as 1e3 is in JSON, for a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, pydantic.BeforeValidator(_whole)]
Share = Annotated[int | float, pydantic.BeforeValidator(_whole)]  # draws depend on how a number is written


class Asked(TypedDict, total=False):
    """The types of what --metadata may say; None, where it stands alone, is the default."""

    lengths: Whole | list[Whole]
    depths: Share | list[Share]
    samples_per_cell: Whole
    haystack: str
    haystack_dir: str | None
    needle_seed: Annotated[Whole, pydantic.Field(ge=-(2**63), lt=2**63)]  # as wide as a column of a data set
    needle_type: str
    key_type: str
    num_keys: Whole
    num_values: Whole
    num_queries: Whole
    wording: str
    floor: bool
    reserved_tokens: Whole


def parse(metadata: Mapping[str, Any]) -> Settings:
    """Settings from what lm-eval hands over; a name that resembles one of ours and is nobody's is an error."""
    known = {f.name for f in fields(Settings)}
    for name in metadata:
        if name not in known and get_close_matches(name, known, cutoff=0.85):
            raise UserError(
                f"unknown setting {name!r} in --metadata{close_names(name, known)}; the needle tasks take "
                f"{', '.join(sorted(known))}"
            )
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in metadata.items() if k in known}
    checked: dict[str, Any] = files.check(asked, Asked, "--metadata")
    for key in {"lengths", "depths"} & checked.keys():
        checked[key] = tuple(_as_list(checked[key]))
    return Settings(**checked)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """One question: prompt = head + filler with facts + tail + question, then " " + gen_prefix where there is one."""

    facts: list[str]
    expected: list[str]
    question: str
    gen_prefix: str = ""
    head: str = ""
    tail: str = "\n\n"
    reference: str = ""  # for word recall
    rouge_reference: str = ""  # where it is another one
    needle_ids: list[str] = field(default_factory=list)
    spread: bool = True  # facts 2, 3, ... between the first one's depth and the end; else anywhere
    source: Source | None = None  # filler of its own


@dataclass(frozen=True)
class Task:
    """A recipe's name, its room for the answer and its scores, the main one first."""

    name: str
    max_new_tokens: int
    scores: tuple[str, ...]
    recipe: Callable[[Draw, Settings], Recipe]


def _words(draw: Draw) -> str:
    return f"{draw.pick(ADJECTIVES)}-{draw.pick(KEYS)}"


def _uuids(draw: Draw) -> str:
    digits = "".join(draw.pick("0123456789abcdef") for _ in range(30))
    return f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-{draw.pick('89ab')}{digits[15:18]}-{digits[18:30]}"


def _numbers(draw: Draw) -> str:
    return draw.pick("123456789") + "".join(draw.pick("0123456789") for _ in range(6))


MAKE = {"numbers": _numbers, "words": _words, "uuids": _uuids}


def different(make: Callable[[Draw], str], draw: Draw, n: int) -> list[str]:
    """n different strings."""
    found: dict[str, None] = {}
    for _ in range(100 * n + 1000):
        if len(found) >= n:
            return list(found)
        found[make(draw)] = None
    raise UserError(f"there are no {n:,} different ones to be made: only about {len(found):,} were found; take fewer")


def _keys(draw: Draw, settings: Settings, n: int) -> list[str]:
    if settings.key_type == "uuids":
        return different(_uuids, draw, n)
    return draw.sample(KEYS, n) if n <= len(KEYS) else different(_words, draw, n)


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


def _statement(settings: Settings, key: str, value: str, several: bool) -> str:
    kind = KINDS[settings.needle_type]
    if settings.wording == "paper" or several:
        return f"One of the special magic {kind}s for {key} is: {value}."
    return f"The special magic {kind} for {key} is {value}."


def _magic(draw: Draw, settings: Settings, num_keys: int, num_values: int, num_asked: int) -> Recipe:
    """RULER's needles: num_keys keys with num_values values each, the values of the first num_asked are asked for."""
    kind = KINDS[settings.needle_type]
    keys = _keys(draw, settings, num_keys)
    values = different(MAKE[settings.needle_type], draw, num_keys * num_values)
    pairs = [(keys[i // num_values], value) for i, value in enumerate(values)]
    asked, expected = _join(keys[:num_asked]), values[: num_asked * num_values]
    one = len(expected) == 1
    noun, verb = (kind, "is") if one else (f"{kind}s", "are")
    if settings.wording == "paper":
        some = "A special magic {} is" if one else "Some special magic {} are"
        head = (
            f"{some.format(noun)} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {noun} afterwards.\n"
        )
        the = "is the" if one else "are all the"
        tail, question = "\n", f"What {the} special magic {noun} for {asked} mentioned in the provided text?"
        prefix = f"The special magic {noun} for {asked} mentioned in the provided text {verb}"
    else:
        head, tail = f"The following text mentions special magic {kind}s. Remember them.\n\n", "\n\n"
        question = f"Question: What {verb} the special magic {noun} for {asked}?\nAnswer:"
        prefix = f"The special magic {noun} for {asked} {verb}"
    return Recipe(
        facts=[_statement(settings, key, value, num_values > 1) for key, value in pairs],
        expected=expected,
        head=head,
        tail=tail,
        question=question,
        gen_prefix=prefix,
        reference=" ".join(expected),
        needle_ids=[f"{kind}:{key}:{value}" for key, value in pairs],
        spread=num_asked == num_keys,
        source=_needles_as_haystack(draw, settings) if settings.haystack == NEEDLES else None,
    )


def _needles_as_haystack(draw: Draw, settings: Settings) -> Source:
    """Facts of the same kind about keys that nobody asks for; the keys are two words, the asked ones' are one."""
    num_chars, parts = 8 * max(settings.lengths), []
    make_key = _uuids if settings.key_type == "uuids" else _words
    while num_chars > 0:
        parts.append(_statement(settings, make_key(draw), MAKE[settings.needle_type](draw), several=False))
        num_chars -= len(parts[-1])
    return Source(NEEDLES, " ".join(parts))


def _classic(draw: Draw, settings: Settings) -> Recipe:
    thing = "eat a sandwich and sit in Dolores Park on a sunny day."
    needle = f"The best thing to do in San Francisco is {thing}"
    common: dict[str, Any] = {"facts": [needle], "expected": [thing.rstrip(".")], "needle_ids": ["san_francisco"]}
    if settings.wording == "paper":
        return Recipe(
            **common,
            head="This is a very long story book: <book> ",
            tail=" </book>.\n Based on the content of the book, ",
            question="Question: The best thing to do in San Francisco is: \nAnswer:",
            reference=thing,
            rouge_reference=needle,
        )
    question = "Question: What is the best thing to do in San Francisco?\nAnswer:"
    return Recipe(**common, question=question, gen_prefix="The best thing to do in San Francisco is", reference=thing)


def _multi(draw: Draw, settings: Settings) -> Recipe:
    things = ["figs", "prosciutto", "goat cheese"]
    rest = "one of the secret ingredients needed to build the perfect pizza"
    return Recipe(
        facts=[f"{t.capitalize()} {'are' if t == 'figs' else 'is'} {rest}." for t in things],
        expected=things,
        question="Question: What are the secret ingredients needed to build the perfect pizza?\nAnswer:",
        gen_prefix="The secret ingredients needed to build the perfect pizza are",
        reference=" ".join(things),
        needle_ids=[t.replace(" ", "_") for t in things],
    )


def _variables(draw: Draw, settings: Settings) -> Recipe:
    names = different(lambda d: "".join(d.pick("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5)), draw, 5)
    value = str(10_000 + draw.below(90_000))
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {new} = VAR {old}." for old, new in zip(names, names[1:], strict=False)]
    return Recipe(
        facts=chain,
        expected=names,
        head="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        tail="\n",
        question=f"Question: Find all variables that are assigned the value {value} in the text above.",
        gen_prefix=(
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:"
        ),
        reference=" ".join(names),
        needle_ids=[f"variable:{name}" for name in names],
    )


ONE = ("contains", "exact")
SEVERAL = ("contains", "contains_any", "contains_every")
SENTENCE = ("recall_words", "recall_content_words", "rouge1_recall", "rouge1_f", "contains")

CLASSIC = Task("kv_needle", 32, SENTENCE, _classic)
MAGIC = Task("kv_needle_magic", 48, ONE, lambda d, s: _magic(d, s, 1, 1, 1))
MULTIKEY = Task("kv_needle_multikey", 48, ONE, lambda d, s: _magic(d, s, s.num_keys, 1, 1))
MULTIVALUE = Task("kv_needle_multivalue", 128, SEVERAL, lambda d, s: _magic(d, s, 1, s.num_values, 1))
MULTIQUERY = Task("kv_needle_multiquery", 128, SEVERAL, lambda d, s: _magic(d, s, s.num_queries, 1, s.num_queries))
MULTI = Task("kv_needle_multi", 64, SEVERAL, _multi)
VT = Task("kv_needle_vt", 48, SEVERAL, _variables)


# ---------------------------------------------------------------------------------------------- the grid


def seeded(*what: object) -> Draw:
    """Draws that depend on all of the arguments."""
    return Draw(int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big"))


def _tokenizer_name(metadata: Mapping[str, Any]) -> str:
    for key in ("tokenizer", "pretrained", "model"):
        value = metadata.get(key)
        value = getattr(value, "name_or_path", value)
        if isinstance(value, str) and value:
            return tiny.resolve(value)
    raise UserError(
        "the needle tasks count tokens with the model's own tokenizer and found none: add pretrained=NAME to "
        '--model_args, or "tokenizer": "NAME" to --metadata'
    )


@lru_cache(maxsize=2)
def _counter(name: str, add_special_tokens: bool | None, trust_remote_code: bool, gguf_file: str | None) -> Counter:
    from transformers import AutoTokenizer

    where = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
    return Counter(tokenizer, add_special_tokens)


def counter_of(metadata: Mapping[str, Any]) -> Counter:
    """Counts as the evaluated model's tokenizer does."""
    bos = metadata.get("add_bos_token")
    remote = bool(metadata.get("trust_remote_code", False))
    inside = None if metadata.get("tokenizer") else metadata.get("gguf_file")  # the weights' file holds it
    return _counter(_tokenizer_name(metadata), bos if isinstance(bos, bool) else None, remote, inside)


def setup(metadata: Mapping[str, Any]) -> tuple[Settings, Counter]:
    """The settings, and the counter of the evaluated model's tokenizer."""
    settings, counter = parse(metadata), counter_of(metadata)
    limit = model_max_length(metadata, counter.tokenizer)
    if limit is not None and max(settings.lengths) > limit and not cuts_long_prompts(metadata):
        raise UserError(
            f"lengths={list(settings.lengths)}: this model takes {limit} tokens, prompt and answer together; give "
            "shorter ones, or max_length=... in --model_args if the model can"
        )
    return settings, counter


def _grid(task: Task, metadata: Mapping[str, Any]) -> dict[str, Dataset]:
    settings, counter = setup(metadata)
    rows = list(_rows(task, settings, counter))
    _say_what_was_missed(task, rows)
    return {"test": Dataset.from_list(rows)}


def _say_what_was_missed(task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    """One warning where facts are further from the depths asked for than is said in the documentation."""
    off = 0
    far: list[float] = []
    for row in rows:
        allowed = haystack.tolerance(row["filler_tokens"]) + 0.02  # depths are rounded
        misses = [abs(a - b) for a, b in zip(row["asked_depth_percents"], row["needle_depth_percents"], strict=True)]
        off, far = off + len(misses), far + [miss for miss in misses if miss > allowed]
    if far:
        haystack.log.warning(
            "%s: %d of %d facts lie up to %.1f per cent of the text away from the depth asked for: words or characters "
            "of so many tokens leave no border nearer by. Take longer prompts; the depths reached are in the samples "
            "(needle_depth_percents) and cells (needle_depth_percent)",
            *(task.name, len(far), off, max(far)),
        )


def _rows(task: Task, settings: Settings, counter: Counter) -> Iterator[dict[str, Any]]:
    if settings.haystack == NEEDLES and task not in (MAGIC, MULTIKEY, MULTIVALUE, MULTIQUERY):
        raise UserError(f'"haystack": "{NEEDLES}" is for the magic tasks, not for {task.name}')
    shared = None if settings.haystack == NEEDLES else haystack.load_source(settings.haystack, settings.haystack_dir)
    for length in settings.lengths:
        room = prompt_room(length, task.max_new_tokens, settings)
        for sample in range(settings.samples_per_cell):
            place = seeded(settings.needle_seed, length, sample).uniform()
            filler = haystack.window(shared, place, room, counter) if shared else None
            if filler and filler.repeats:
                haystack.log.warning(
                    "%s: a prompt of %d tokens repeats the haystack %s, which is shorter, %d times; take more text",
                    *(task.name, length, shared.name if shared else "", filler.repeats),
                )
            for depth in settings.depths:
                seed = (task.name, settings.needle_seed, length, depth, sample)
                recipe = _recipe(task, settings, filler, seed)
                source = recipe.source or shared
                assert source is not None
                around = filler or haystack.window(source, 0, room, counter)
                for removed in (False, True) if settings.floor else (False,):
                    row = _hide(task, recipe, around, depth, room, counter, seeded("depths", *seed), removed)
                    yield {
                        **row,
                        "context_length": length,
                        "document_depth_percent": float(depth),
                        "sample": sample,
                        "cluster": f"{source.sha256[:16]} {length} {sample}"
                        if filler
                        else "",  # they share their filler
                        "needle_seed": settings.needle_seed,
                        "haystack": source.name,
                        "haystack_sha256": source.sha256,
                        "haystack_repeats": around.repeats,
                        **labels(task.scores, length, depth),
                    }


def prompt_room(length: int, max_new_tokens: int, settings: Settings) -> int:
    """Tokens for the prompt, once the answer has its own."""
    room = length - max_new_tokens - settings.reserved_tokens
    if room < 1:
        raise UserError(
            f"a length of {length} tokens leaves no prompt beside the {max_new_tokens} tokens of the answer"
            + (f" and {settings.reserved_tokens} reserved ones" if settings.reserved_tokens else "")
        )
    return room


def labels(scores: tuple[str, ...], length: int, depth: float | None) -> dict[str, Any]:
    """What scoring.py and the model read of a document: its scores, its cell's name, that it takes an OOM mark."""
    cell = f"{length} tokens" + ("" if depth is None else f", depth {depth:g} %")
    return {"scores": list(scores), "progress_label": cell, "takes_failures": True}


def _recipe(task: Task, settings: Settings, filler: Window | None, seed: tuple[Any, ...]) -> Recipe:
    """A recipe none of whose answers stands in the filler by chance; where one always does, the last one drawn."""
    for attempt in range(20):
        recipe = task.recipe(seeded(*seed, attempt), settings)
        if filler is None or not any(e in filler.text for e in recipe.expected):
            break
    return recipe


def _hide(
    task: Task,
    recipe: Recipe,
    filler: Window,
    depth: float,
    room: int,
    counter: Counter,
    draw: Draw,
    removed: bool,
) -> dict[str, Any]:
    n = len(recipe.facts)
    if recipe.spread:
        depths = [depth + i * (100 - depth) / n for i in range(n)]
    else:
        depths = [depth, *(100 * draw.uniform() for _ in range(n - 1))]
    ending = recipe.question + (f" {recipe.gen_prefix}" if recipe.gen_prefix else "")

    def render(text: str) -> tuple[str, str]:
        context = recipe.head + text + recipe.tail
        return context, context + ending

    hidden = haystack.hide(filler, [] if removed else recipe.facts, [] if removed else depths, room, counter, render)
    return {
        "context": hidden.context,
        "question": recipe.question,
        "gen_prefix": recipe.gen_prefix,
        "expected": recipe.expected,
        "reference": recipe.reference,
        "rouge_reference": recipe.rouge_reference or recipe.reference,
        "length_tokens": hidden.length_tokens,
        "needle_ids": recipe.needle_ids,
        "filler_tokens": hidden.filler_tokens,
        "asked_depth_percents": [] if removed else [round(d, 2) for d in depths],
        "needle_depth_percents": list(hidden.depths),
        "needle_removed": removed,
    }


# ---------------------------------------------------------------------------------------------- lm-eval's functions


def prompt(doc: dict[str, Any]) -> str:
    """doc_to_text; lm-eval adds " " and gen_prefix, or gives gen_prefix to the chat template."""
    return doc["context"] + doc["question"]


def classic(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle: the best thing to do in San Francisco."""
    return _grid(CLASSIC, metadata)


def magic(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_magic: one number, word or uuid."""
    return _grid(MAGIC, metadata)


def multikey(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_multikey: one of num_keys."""
    return _grid(MULTIKEY, metadata)


def multivalue(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_multivalue: all num_values of one key."""
    return _grid(MULTIVALUE, metadata)


def multiquery(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_multiquery: the values of all num_queries keys."""
    return _grid(MULTIQUERY, metadata)


def multi(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_multi: three secret ingredients."""
    return _grid(MULTI, metadata)


def vt(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_vt: a chain of variables."""
    return _grid(VT, metadata)
