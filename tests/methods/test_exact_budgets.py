"""What layers and heads really hold after a cut has the budget as its mean, whatever shares it out: counted in caches
of real models, over methods x budgets x lengths x layers x heads x sliding patterns."""

from __future__ import annotations

import functools
import random
from fractions import Fraction
from typing import Any

import pytest
import tiny

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base, evicted

FULL, SLIDING = "full_attention", "sliding_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "2 layers": ("llama", {}),
    "5 layers": ("llama", {"num_hidden_layers": 5}),
    "6 layers of 4 heads": ("llama", {"num_hidden_layers": 6, "num_key_value_heads": 4}),
    "1 layer of 1 head": ("llama", {"num_hidden_layers": 1, "num_key_value_heads": 1}),
    "every third": ("gemma3", {"num_hidden_layers": 7, "layer_types": [SLIDING, SLIDING, FULL] * 2 + [SLIDING]}),
    "3 of 5": ("gemma3", {"num_hidden_layers": 5, "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL]}),
    "all sliding": ("mistral_sliding", {"num_hidden_layers": 3, "sliding_window": 30}),
}
METHODS = tiny.methods(lambda cls: cls.compresses and cls.takes_budget)
CASES = 160


@functools.cache
def model(name: str) -> tuple[Any, Any]:
    kind, overrides = MODELS[name]
    model = tiny.build(kind, **overrides)
    return model, tiny.wrap(model, tiny.compression(method="expected_attention", max_capacity_prompt=9))


def draw(rng: random.Random, layers: int) -> dict[str, Any]:
    """Settings of some composition, perhaps one that is refused."""
    method = rng.choice(METHODS)
    budget = rng.choice(
        [
            {"max_capacity_prompt": rng.randint(6, 40)},
            {"keep_ratio": rng.choice([0.05, 0.1, 0.29, 0.5, 0.7, 0.9])},
            {"compression_ratio": rng.choice([0.1, 0.25, 0.5, 0.75, 0.9])},
        ]
    )
    cls = base.load(method)
    own = {k: v for k, v in tiny.free(method, 8).items() if k not in ("max_capacity_prompt", *cls.capacity_settings)}
    few = {"n_sink": 2} if "n_sink" in tiny.fields_of(cls) else {}
    args = {**own, **few, **budget}
    if rng.random() < 0.6:
        args["layer_budget"] = rng.choice(["uniform", "pyramid", "pyramid", "global"])
    if args.get("layer_budget") == "pyramid":
        args["beta"] = rng.choice([1, 2, 7, 20])
    if rng.random() < 0.5:
        args |= {"head_budget": "ada", "alpha": rng.choice([0, 0.2, 0.5, 1])}
    if rng.random() < 0.3 and layers > 1:
        args["skip_layers"] = rng.sample(range(layers), rng.randint(1, layers // 2))
    if "gqa" in tiny.fields_of(cls) and rng.random() < 0.2:
        args["gqa"] = "query_head"
    if rng.random() < 0.3:
        args["evicted"] = rng.choice([name for name in evicted.available() if name != "drop"])
    if rng.random() < 0.7:
        args["compress_every"] = rng.choice([0, 1, 1, 3])
    return args


def asked(args: dict[str, Any], tokens: int) -> int:
    """Slots of the mean layer and head, from the settings as they are written."""
    if "max_capacity_prompt" in args:
        return args["max_capacity_prompt"]
    share = Fraction(str(args["keep_ratio"])) if "keep_ratio" in args else 1 - Fraction(str(args["compression_ratio"]))
    return max(1, int(share * tokens))


@pytest.mark.parametrize("part", range(4))
def test_the_mean_over_cut_layers_and_heads_is_the_budget(part: int) -> None:
    rng, ran, shared, over = random.Random(part), 0, 0, 0
    while ran < CASES // 4:
        name = rng.choice(list(MODELS))
        net, facts = model(name)
        args = draw(rng, facts.num_layers)
        try:
            compression = tiny.compression(**args)
            compression.check_model(facts)
        except UserError:
            continue
        ran += 1
        shared += compression.layers.differ or compression.heads.differ
        cache = make_cache(compression, facts)
        lengths = [rng.randint(2, 70) for _ in range(2)]
        rows = [tiny.tokens(n + 4, seed=n) for n in lengths]
        cut = [i for i in facts.cut_layers if i not in args.get("skip_layers", [])]
        every = compression.schedule.compress_every
        for step in range(5):
            fed = [r[:n] if step == 0 else r[n + step - 1 : n + step] for r, n in zip(rows, lengths, strict=True)]
            tiny.forward(net, cache, fed, starts=[n + step - 1 for n in lengths] if step else None)
            if step and (every != 1 or "max_capacity_prompt" not in args or compression.schedule.trigger != "clock"):
                continue  # cuts after the prefill are all alike where the budget does not grow with the text
            if step and compression.method.ring:  # its slots are one more, which the next token overwrites
                continue
            for b, n in enumerate(lengths):
                heads = [[len(head) for head in tiny.kept(cache, i, b)] for i in cut]
                mean = Fraction(sum(Fraction(sum(h), len(h)) for h in heads), len(heads))
                budget, protected = asked(args, n), compression.method.protected
                there = n + step
                if facts.all_sliding and compression.method.sinks_and_recent is None:  # scores choose of what is seen
                    there = min(there, facts.sliding_windows[0] - 1)
                where = f"{args} on {name}, {n} tokens and {step}: {heads}"
                if budget <= protected:  # what always stays is as much as was asked, or more
                    assert mean == min(protected, there) and compression.over_budget(n) == (budget < n), where
                    over += 1
                else:
                    assert mean == min(budget, there), where
                for i in set(range(facts.num_layers)).difference(cut):
                    window = facts.sliding_windows[i]
                    whole = n + step if window is None else min(n + step, window - 1)
                    assert min(len(h) for h in tiny.kept(cache, i, b)) >= whole, f"{where}: layer {i} is not whole"
    assert shared > CASES // 10 and over
