"""Many questions on one context: it is read and compressed once, and each answer is the one that it has alone."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from model.test_question_in_prompt import AGNOSTIC, METHODS
from model.test_requests import STORY, load

pytestmark = pytest.mark.filterwarnings("ignore")
CONTEXTS = (STORY * 3, STORY * 2 + "The end. ")
ASKED = ("What is the number for harbour?", "Who saw the ferry leave?", "Where?", "The special magic number is")


def asked(kind: str, *rest: object) -> list[Instance]:
    """Every question of every context, in an order in which no context follows itself."""
    pairs = [(context, question) for question in ASKED for context in CONTEXTS]
    return [
        Instance(kind, {"question": q, "text": c}, (f"{c}\n{q}", *rest), 0, ("t", i, 1))
        for i, (c, q) in enumerate(pairs)
    ]


def fed(lm) -> list[int]:
    """Tokens of every forward from here on."""
    counts: list[int] = []
    lm.model.get_input_embeddings().register_forward_hook(lambda module, args, out: counts.append(args[0].numel()))
    return counts


SETTINGS = [
    *METHODS,
    {**METHODS[0], "nbits": 4, "group_size": 8, "residual_length": 8},
    {**METHODS[0], "prefill_chunk": 32},
]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_answers_are_those_of_each_question_alone_and_a_context_is_read_once(settings, size: int) -> None:
    together = load("kvcompressed", batch_size=size, **settings, **AGNOSTIC)
    generations = asked("generate_until", {"until": ["\n"], "max_gen_toks": 6})
    choices = [choice for c in (48213, 777) for choice in asked("loglikelihood", f" {c}")]
    counts = fed(together)
    got = together.generate_until(generations, disable_tqdm=True)
    read = sum(counts)
    scores = together.loglikelihood(choices, disable_tqdm=True)
    stats = together.get_model_info()["kv_stats"]

    alone = load("kvcompressed", batch_size=1, **settings, **AGNOSTIC)
    counts = fed(alone)
    expected = [alone.generate_until([one], disable_tqdm=True)[0] for one in generations]
    assert got == expected
    context = min(len(alone.tok_encode(c)) for c in CONTEXTS)
    assert sum(counts) - read >= (len(ASKED) - 1) * len(CONTEXTS) * (context - 8), "read again for every question"
    for one, (score, greedy) in zip(choices, scores, strict=True):
        ((single, same),) = alone.loglikelihood([one], disable_tqdm=True)
        assert score == pytest.approx(single, abs=2e-4) and greedy == same
    own = alone.get_model_info()["kv_stats"]
    for name in ("requests", "compressed_share", "kept_fraction_mean", "kv_bytes_prefill_mean", "question_tokens"):
        assert stats[name] == pytest.approx(own[name]), name
