"""The documents of the quick-start tasks, written when a task is loaded: nothing is downloaded.

All texts are the same on every machine and Python version. Lengths are tokens of kv-tiny's tokenizer; other models see
the same text, at a somewhat different number of tokens.

lm-eval loads this file by its path, beside the YAML that names it, hence the absolute imports. It calls the builders
with all of --model_args, which they ignore: every method must be asked the same.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer

from kv_lm_eval import quiet, tiny
from kv_lm_eval.files import read_text
from kv_lm_eval.tiny import episodes
from kv_lm_eval.tiny.episodes import Draw, Haystack, Needle

NEEDLE_LENGTHS = (256, 512, 768)
NEEDLE_DEPTHS = (0, 25, 50, 75, 100)
NEEDLE_REPEATS = 2
CHOICE_LENGTH = 512
CHOICE_DEPTHS = (5, 35, 65, 95)
CHOICE_REPEATS = 6
NUM_NEEDLES = 4
TEXTS = Path(__file__).parent / "texts"
PPL_TEXTS = ("ferry", "memory")


quiet.install()


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(Path(tiny.path()) / "tokenizer.json"))


def count_tokens(text: str) -> int:
    """Returns the number of kv-tiny tokens of a text, without BOS."""
    return len(_tokenizer().encode(text, add_special_tokens=False).ids)


def _count_joined(sentence: str) -> int:
    return count_tokens(" " + sentence)


def _prompt(
    draw: Draw, needles: list[Needle], asked: Needle, depth_percents: list[float], context_length: int
) -> tuple[str, Haystack]:
    """Writes one prompt of at most `context_length` tokens, less than one or two sentences shorter than that."""
    statements = [needle.statement for needle in needles]
    question = "\n\n" + episodes.question(asked)
    room = context_length - count_tokens(question) - sum(map(_count_joined, statements))
    # The very first word has no space before it, which may cost some tokens more than counted.
    filler = episodes.take(episodes.grammar_sentences(draw), room - 4, _count_joined)
    haystack = episodes.weave(filler, statements, [percent / 100 for percent in depth_percents])
    return haystack.text + question, haystack


def needle(**_: object) -> dict[str, Dataset]:
    """Four numbers in a text and the question for one of them, over a grid of lengths and depths.

    The asked one lies at `document_depth_percent` of the filler, the others anywhere.
    """
    rows = []
    for context_length in NEEDLE_LENGTHS:
        for depth_percent in NEEDLE_DEPTHS:
            for repeat in range(NEEDLE_REPEATS):
                draw = Draw(1_000_000 + 1000 * context_length + 10 * depth_percent + repeat)
                needles = episodes.needles(draw, NUM_NEEDLES)
                depths = [float(depth_percent), *(100 * draw.uniform() for _ in needles[1:])]
                prompt, haystack = _prompt(draw, needles, needles[0], depths, context_length)
                rows.append(
                    {
                        "prompt": prompt,
                        "question": episodes.question(needles[0]),
                        "key": needles[0].key,
                        "value": needles[0].value,
                        "context_length": context_length,
                        "document_depth_percent": depth_percent,
                        "depth": haystack.depths[0],
                    }
                )
    return {"test": Dataset.from_list(rows)}


def choice(**_: object) -> dict[str, Dataset]:
    """Four numbers in a text, all offered as the answer; only the text says which belongs to the asked key.

    The four differ in their first digit, hence in their first token, and are of the same length.
    """
    rows = []
    for asked, depth_percent in enumerate(CHOICE_DEPTHS):
        for repeat in range(CHOICE_REPEATS):
            draw = Draw(2_000_000 + 10 * depth_percent + repeat)
            needles = episodes.needles(draw, NUM_NEEDLES)
            depths = [float(depth) for depth in CHOICE_DEPTHS]
            prompt, haystack = _prompt(draw, needles, needles[asked], depths, CHOICE_LENGTH)
            order = draw.sample(range(NUM_NEEDLES), NUM_NEEDLES)
            rows.append(
                {
                    "prompt": prompt,
                    "question": episodes.question(needles[asked]),
                    "key": needles[asked].key,
                    "choices": [needles[i].value for i in order],
                    "label": order.index(asked),
                    "context_length": CHOICE_LENGTH,
                    "document_depth_percent": depth_percent,
                    "depth": haystack.depths[asked],
                }
            )
    return {"test": Dataset.from_list(rows)}


def ppl(**_: object) -> dict[str, Dataset]:
    """A story and an essay of about 2,000 tokens each, written for this package, so that kv-tiny never saw them."""
    rows = []
    for name in PPL_TEXTS:
        page = read_text(TEXTS / f"{name}.txt")
        rows.append({"page": page, "name": name, "sha256": hashlib.sha256(page.encode()).hexdigest()})
    return {"test": Dataset.from_list(rows)}


def process_ppl(doc: dict[str, str], results: list[float]) -> dict[str, tuple[float, int]]:
    """Pairs the log-likelihood (nats) with the bytes that lm-eval's perplexities divide by, as its wikitext does."""
    (loglikelihood,) = results
    size_bytes = len(doc["page"].encode())
    return {"bits_per_byte": (loglikelihood, size_bytes), "byte_perplexity": (loglikelihood, size_bytes)}
