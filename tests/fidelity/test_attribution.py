"""One part compressed at a time: which pairs are gone, what it costs, and what the command prints and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fidelity.references import PREFIX, pair64

from kv_lm_eval import cli
from kv_lm_eval import tiny as embedded
from kv_lm_eval.analysis import attribution
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.fidelity import score_beside
from kv_lm_eval.engine.streaming import Stream, forwards
from kv_lm_eval.errors import UserError

TEXT = Path(embedded.__file__).parents[1] / "tasks" / "quickstart" / "texts" / "ferry.txt"
SETTINGS = [
    {"method": "knorm", "max_capacity_prompt": 12},
    {"method": "window", "window_size": 12},
    {"method": "streaming_llm", "n_sink": 2, "window_size": 10, "positions": "absolute"},
    {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 12},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["method"])
@pytest.mark.parametrize("what", ["layers", "heads"])
def test_only_the_part_loses_pairs_and_it_keeps_what_the_method_would(what, settings) -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(40)
    *parts, whole = attribution.parts_of(what, settings, pair.facts)
    assert len(parts) == (2 if what == "layers" else 4)

    def kept(compression):
        cache = make_cache(compression, pair.facts)
        tiny.forward(pair.model, cache, [row])
        return [tiny.kept(cache, layer) for layer in range(2)]

    def by_head(heads):
        return heads * 2 if len(heads) == 1 else heads

    everything = kept(whole.compression)
    for part in parts:
        found = kept(part.compression)
        for layer in range(2):
            for head, (got, wanted) in enumerate(zip(by_head(found[layer]), by_head(everything[layer]), strict=True)):
                mine = part.layer == layer and part.head in (None, head)
                # above a part that was cut other keys are in question, but nothing is cut there
                assert got == (wanted if mine and part.layer == 0 else sorted(got)) and len(got) == (12 if mine else 40)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["method"])
def test_a_streams_divergence_is_that_of_a_run_with_the_other_layers_skipped(settings) -> None:
    pair, document = pair64("llama"), tiny.tokens(80)
    numbers = attribution.attribute(
        pair.model, pair.facts, attribution.parts_of("layers", settings, pair.facts), PREFIX, document, 5
    )
    for one in numbers[:2]:
        other = 1 - one["layer"]
        asked = tiny.compression(**settings, skip_layers=[other])
        (wanted,) = score_beside(pair.model, partial(make_cache, asked, pair.facts), [document], Stream(PREFIX, 5))[2]
        assert one["kl"] == pytest.approx(wanted.kl.mean(), rel=1e-9) and one["change"] > 1e-3
    heads = attribution.attribute(
        pair.model, pair.facts, attribution.parts_of("heads", settings, pair.facts), PREFIX, document, 5
    )
    assert all(one["kl"] > 1e-6 and one["change"] > 1e-6 for one in heads[:-1])
    assert heads[-1]["kl"] == pytest.approx(numbers[-1]["kl"], rel=1e-9)


def test_the_change_is_that_of_the_attention_output_of_both_runs() -> None:
    """In the first layer of a window, by hand: the outputs of two runs, one after the other."""
    pair, document = pair64("llama"), tiny.tokens(50)
    parts = attribution.parts_of("layers", {"method": "window", "window_size": 8}, pair.facts)
    found = attribution.attribute(pair.model, pair.facts, parts[:1], PREFIX, document, 1)[0]["change"]
    outputs = []
    for visible in (10**9, 8):
        noted = []
        hook = pair.stock.model.layers[0].self_attn.register_forward_hook(
            lambda m, a, out, noted=noted: noted.append(out[0][0])
        )
        n = len(document)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen &= torch.arange(n)[:, None] - torch.arange(n)[None, :] <= visible  # 8 before it, and itself: cut after
        mask = torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            pair.stock(input_ids=torch.tensor([[PREFIX, *document[:-1]]]), attention_mask=mask, use_cache=False)
        hook.remove()
        outputs.append(noted[0])
    full, ours = outputs
    assert found == pytest.approx(float(((ours - full).norm(dim=-1) / full.norm(dim=-1)).mean()), rel=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["method"])
@pytest.mark.parametrize("every", [1, 5])
def test_the_lost_mass_is_the_stock_models_attention_to_what_is_gone(settings, every) -> None:
    """The stock model's own weights, over the pairs that a cache of the first layer alone holds, token by token."""
    pair, document = pair64("llama"), tiny.tokens(50)
    (part, *_) = attribution.parts_of("layers", settings, pair.facts)
    found = attribution.attribute(pair.model, pair.facts, [part], PREFIX, document, every)[0]["lost_mass"]
    row = [PREFIX, *document[:-1]]
    stock = tiny.build("llama").double()
    stock.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = stock(input_ids=torch.tensor([row]), use_cache=False, output_attentions=True).attentions[0][0]
    schedule = replace(part.compression.schedule, compress_every=every)
    cache = make_cache(replace(part.compression, schedule=schedule), pair.facts)
    lost, kv_heads, held = [], pair.facts.heads[0][1], [[]]
    group = len(weights) // kv_heads
    for (t,), _ in forwards(pair.model, cache, [row], most=1):
        held = held * kv_heads if len(held) == 1 else held
        for head, of_head in enumerate(weights[:, t]):
            lost.append(1 - float(of_head[[*held[head // group], t]].sum()))
        held = tiny.kept(cache, 0)
    assert len(lost) == len(weights) * len(row)
    assert found == pytest.approx(np.mean(lost), rel=1e-6) and found > 1e-3


def test_rank_correlation_is_that_of_places() -> None:
    assert attribution.rank_correlation([1, 5, 9], [0.1, 0.2, 7]) == pytest.approx(1)
    assert attribution.rank_correlation([1, 5, 9], [3, 2, 1]) == pytest.approx(-1)
    assert attribution.rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(
        np.corrcoef([0.5, 0.5, 2], [0, 1, 2])[0, 1]
    )
    assert attribution.rank_correlation([1, 1], [1, 2]) is None and attribution.rank_correlation([], []) is None


def test_what_has_no_parts_is_refused() -> None:
    facts = tiny.pair("llama").facts
    for what, settings, message in (
        ("layers", {"method": "full"}, "evicts nothing"),
        ("heads", {"method": "knorm", "keep_ratio": 0.5}, "takes max_capacity_prompt"),
        ("layers", {"method": "streaming_ring", "max_capacity_prompt": 9, "n_sink": 1}, "streaming_llm keeps the same"),
        ("heads", {"method": "knorm", "max_capacity_prompt": 9, "head_budget": "ada"}, "takes max_capacity_prompt"),
    ):
        with pytest.raises(UserError, match=message):
            attribution.parts_of(what, settings, facts)


def test_the_command_prints_and_writes_all_of_it(tmp_path, capsys) -> None:
    asked = [
        "--text",
        str(TEXT),
        "--tokens",
        "90",
        "--model_args",
        "pretrained=kv-tiny,method=tova,max_capacity_prompt=24",
    ]
    for what, parts in (("layers", 5), ("heads", 13), ("treatments", 4)):
        assert cli.main(["fidelity", "--attribute", what, "--output_path", str(tmp_path), *asked]) == 0
        said = capsys.readouterr().out.splitlines()
        found = json.loads(said[-1])
        assert found == json.loads((tmp_path / f"attribution_{what}.json").read_text()) and found["tokens"] == 90
        assert (tmp_path / f"attribution_{what}.png").stat().st_size > 5000
        assert len(found["parts"]) == parts
        assert (found["parts"][-1]["part"] == "all together") == (what != "treatments")
        assert sum(line.startswith(("layer", "evicted", "all")) for line in said) == parts
    assert cli.main(["fidelity", "--attribute", "layers", *asked[:-1], "method=tova"]) == 2
    assert "pretrained=NAME" in capsys.readouterr().err
