"""Head-aware windows: masks against loops over the definition, the cache against the masks, profiles and refusals.

The oracle is the stock model with its eager attention and a mask of its own for every layer and query head, built
position by position. Logits are of the order of 10, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import tiny
import torch
import transformers as tf

from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.head_profile import Head, HeadProfile

MODELS = ("llama", "gpt_neox")  # 4 query heads on 2 and on 4 KV heads
PREFIX = 5
# Two layers of four query heads: the first with equal types in each group of the grouped-query model, so that its
# cache can hold exactly what its masks show; the second mixed within a group.
EQUAL = (("positional", "positional", "mixed", "mixed"), ("gathering", "gathering", "dead", "dead"))
MIXED = (("positional", "mixed", "dead", "positional"), ("gathering", "dead", "positional", "mixed"))
SURE = ((0.9, 0.9, 0.3, 0.3), (0.8, 0.8, 0.7, 0.7))
WINDOWS = {"positional_window": 5, "mixed_window": 12, "gathering_window": -1}


def kv_heads(name: str) -> int:
    return 2 if name == "llama" else 4


Profiles = Callable[..., str]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Profiles:
    folder = tmp_path_factory.mktemp("profiles")

    @functools.cache
    def write(name: str, types: tuple[tuple[str, ...], ...] = EQUAL, kv: int | None = None) -> str:
        heads = tuple(
            tuple(Head(kind, sure, 9) for kind, sure in zip(row, sures, strict=True))
            for row, sures in zip(types, SURE * len(types), strict=False)
        )
        path = folder / f"{name}-{abs(hash((types, kv)))}.json"
        HeadProfile(f"tiny {name}", kv or kv_heads(name), {}, {}, heads).save(path)
        return str(path)

    return write


# --- what each head may see, in loops -------------------------------------------------------------------------------


def sees(kind: str, query: int, key: int, sinks: int, windows: dict[str, int]) -> bool:
    """The definition: k <= q and (k < S or q - k < w); a dead head sees itself."""
    if key > query:
        return False
    if kind == "dead":
        return key == query
    window = windows[f"{kind}_window"]
    return key < sinks or window == -1 or query - key < window


def shown(
    types: tuple[tuple[str, ...], ...], n: int, sinks: int, windows: dict[str, int]
) -> list[list[list[set[int]]]]:
    """[layer][query head][query] -> the positions that it sees."""
    return [
        [[{k for k in range(n) if sees(kind, q, k, sinks, windows)} for q in range(n)] for kind in layer]
        for layer in types
    ]


@functools.cache
def eager(name: str) -> tf.PreTrainedModel:
    stock = tiny.build(name)
    stock.set_attn_implementation("eager")
    return stock


@torch.inference_mode()
def stock_logits(name: str, row: list[int], visible: list[list[list[set[int]]]]) -> torch.Tensor:
    """Logits [n, V] of the stock model under explicit 4D masks, one for every layer and query head."""
    stock, n, handles = eager(name), len(row), []
    for module in stock.modules():
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
            heads = visible[module.layer_idx]
            mask = torch.full((1, len(heads), n, n), torch.finfo(torch.float32).min)
            for head, queries in enumerate(heads):
                for query, keys in enumerate(queries):
                    mask[0, head, query, sorted(keys)] = 0
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
                )
            )
    try:
        return stock(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def streamed(pair: tiny.Pair, documents: list[list[int]], **settings: object) -> list[torch.Tensor]:
    every = int(settings.get("compress_every", 1))  # type: ignore[call-overload]
    scored, _ = score_documents(
        pair.model, lambda: pair.cache(method="head_aware", **settings), documents, Stream(PREFIX, every)
    )
    return [one.log_probs for one in scored]


def log_probs(logits: torch.Tensor, document: list[int]) -> torch.Tensor:
    return logits.log_softmax(-1)[torch.arange(len(document)), document]


# --- the simulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("types", [EQUAL, MIXED])
@pytest.mark.parametrize("sinks", [0, 4])
def test_simulated_heads_see_what_the_definition_says(
    name: str, types: tuple[tuple[str, ...], ...], sinks: int, profiles: Profiles
) -> None:
    pair = tiny.pair(name)
    settings = {"profile": profiles(name, types), "mode": "simulate", "n_sink": sinks, **WINDOWS}
    lengths, chunks = (40, 23, 9), (1, 6, 1)
    rows = [tiny.tokens(n + sum(chunks), seed=n) for n in lengths]
    cache = pair.cache(method="head_aware", **settings)
    prompts = [r[:n] for r, n in zip(rows, lengths, strict=True)]
    got = [tiny.forward(pair.model, cache, prompts)]
    done = 0
    for chunk in chunks:
        part = [r[n + done : n + done + chunk] for r, n in zip(rows, lengths, strict=True)]
        got.append(tiny.forward(pair.model, cache, part, starts=[n + done for n in lengths]))
        done += chunk
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        expected = stock_logits(name, row, shown(types, len(row), sinks, WINDOWS))
        logits = torch.cat([got[0][b, max(lengths) - n :], *(g[b] for g in got[1:])])
        assert (logits - expected).abs().max() <= 1e-4, f"row of {n} tokens"
        unmasked = stock_logits(name, row, shown((("gathering",) * 4,) * 2, len(row), sinks, WINDOWS))
        assert (logits - unmasked).abs().max() > 0.1, "the comparison would not notice a wrong mask"
    assert all(store.length == max(lengths) + sum(chunks) for store in cache.stores), "a simulation drops nothing"


def test_blocks_of_queries_do_not_change_a_simulation(profiles: Profiles, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, settings = tiny.pair("llama"), {"profile": profiles("llama", MIXED), "mode": "simulate", **WINDOWS}
    (whole,) = streamed(pair, [tiny.tokens(90)], **settings)
    monkeypatch.setattr("kv_lm_eval.cache.attention.MASK_ELEMENTS", 4 * 91 * 3)
    (blocks,) = streamed(pair, [tiny.tokens(90)], **settings)
    assert (whole - blocks).abs().max() <= 1e-4


PRESETS = {  # preset: (settings, windows of the types, sinks)
    "A_window": ({"base_window": 10}, (10, 10, 10), 0),
    "B_streaming": ({"base_window": 14}, (10, 10, 10), 4),
    "K_uniform": ({"base_window": 10}, (10, 10, 10), 4),
    "I_inverse": ({}, (256, 64, 128), 4),
    "J_small_gathering": ({}, (16, 64, 128), 4),
    "G_conf": ({"confidence": 0.5, "base_window": 20}, (16, 20, 256), 4),  # mixed heads are below 0.5 in this profile
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_masks(preset: str, profiles: Profiles) -> None:
    settings, (positional, mixed, gathering), sinks = PRESETS[preset]
    pair, document = tiny.pair("llama"), tiny.tokens(100, seed=8)
    typed = {} if "confidence" not in settings and settings else {"profile": profiles("llama")}
    types = EQUAL if typed else (("mixed",) * 4,) * 2
    windows = {"positional_window": positional, "mixed_window": mixed, "gathering_window": gathering}
    (got,) = streamed(pair, [document], preset=preset, mode="simulate", **settings, **typed)
    expected = stock_logits("llama", [PREFIX, *document[:-1]], shown(types, 100, sinks, windows))
    assert (got - log_probs(expected, document)).abs().max() <= 1e-4


def test_settings_beside_a_preset_win_and_a_base_of_64_has_its_own_windows(profiles: Profiles) -> None:
    def spans(**settings: object) -> set[tuple[int, int | None]]:
        method = tiny.compression(method="head_aware", profile=profiles("llama"), **settings).method
        return {span for layer in method.spans for span in layer}

    assert spans(preset="G_conf", base_window=64) == {(4, 8), (4, 64), (4, 128), (0, 1)}
    assert spans(preset="G_conf", confidence=0.95) == {(4, 128)}
    assert spans(preset="I_inverse", positional_window=512, dead_window=3, n_sink=2) == {
        (2, 512),
        (2, 64),
        (2, 128),
        (2, 3),
    }
    assert spans() == {(4, 9), (0, 1)}, "without a preset the windows of the profile"


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sinks", [0, 4])
def test_a_cache_cut_at_every_token_equals_the_simulation_where_groups_agree(
    name: str, sinks: int, profiles: Profiles
) -> None:
    pair, types = tiny.pair(name), EQUAL if name == "llama" else MIXED
    settings = {"profile": profiles(name, types), "n_sink": sinks, **WINDOWS}
    documents = [tiny.tokens(n, seed=n) for n in (47, 28, 13, 2)]
    dropped = streamed(pair, documents, **settings)
    hidden = streamed(pair, documents, mode="simulate", **settings)
    for document, cache, mask in zip(documents, dropped, hidden, strict=True):
        visible = shown(types, len(document), sinks, WINDOWS)
        expected = log_probs(stock_logits(name, [PREFIX, *document[:-1]], visible), document)
        assert (mask - expected).abs().max() <= 1e-4
        assert (cache - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_each_kv_head_holds_the_union_of_what_its_query_heads_need(name: str, every: int, profiles: Profiles) -> None:
    pair, group = tiny.pair(name), 4 // kv_heads(name)
    settings = {"profile": profiles(name, MIXED), "compress_every": every, **WINDOWS}
    cache = pair.cache(method="head_aware", **settings)
    sizes = {"positional": 4 + 5 - 1, "mixed": 4 + 12 - 1, "gathering": 10**6, "dead": 0}
    lengths = [30, 17]
    row = [tiny.tokens(n + 10, seed=n) for n in lengths]
    visible = [[[[] for _ in range(4)] for _ in range(2)] for _ in lengths]  # [row][layer][query head][query]
    logits = [[] for _ in lengths]
    slot_bytes = 2 * 8 * 4
    for step in range(11):
        fed = [r[:n] if step == 0 else r[n + step - 1 : n + step] for r, n in zip(row, lengths, strict=True)]
        before = [[tiny.kept(cache, layer, b) for layer in range(2)] if step else None for b in range(2)]
        out = tiny.forward(pair.model, cache, fed, starts=[0 if step == 0 else n + step - 1 for n in lengths])
        total = [0, 0]
        for b, n in enumerate(lengths):
            seen = n + step
            logits[b].append(out[b, -len(fed[b]) :])
            for layer in range(2):
                kept = tiny.kept(cache, layer, b)
                for head in range(4 // group):
                    most = max(sizes[kind] for kind in MIXED[layer][head * group : (head + 1) * group])
                    if step % every == 0:
                        expected = set(range(seen)) if most >= seen else {*range(4), *range(seen - most + 4, seen)}
                        expected = set() if most == 0 else expected
                    else:
                        expected = {*before[b][layer][head], seen - 1}
                    assert set(kept[head]) == expected
                    total[b] += len(expected)
                for query_head in range(4):
                    past = visible[b][layer][query_head]
                    if before[b] is None:
                        past.extend(set(range(q + 1)) for q in range(n))
                    else:
                        past.append({*before[b][layer][query_head // group], seen - 1})
        snapshot = cache.snapshot()
        assert snapshot["kv_bytes_valid"] == pytest.approx([t * slot_bytes for t in total])
        assert snapshot["kept_fraction"] == pytest.approx(
            [t / (2 * 4 // group) / (n + step) for t, n in zip(total, lengths, strict=True)]
        )
    for b, tokens in enumerate(row):
        expected_logits = stock_logits(name, tokens, visible[b])
        assert (torch.cat(logits[b]) - expected_logits).abs().max() <= 1e-4


@pytest.mark.parametrize("every", [1, 4, 7])
def test_lazy_cuts_are_declared_in_advance_and_batches_do_not_matter(every: int, profiles: Profiles) -> None:
    pair = tiny.pair("llama")
    settings = {"profile": profiles("llama", MIXED), "compress_every": every, **WINDOWS, "gathering_window": 20}
    documents = [tiny.tokens(n, seed=n) for n in (61, 33, 8)]
    together = streamed(pair, documents, **settings)
    for document, got in zip(documents, together, strict=True):
        (alone,) = streamed(pair, [document], **settings)
        assert (got - alone).abs().max() <= 1e-4
    compression = tiny.compression(method="head_aware", **settings)
    cache = pair.cache(method="head_aware", **settings)
    for t, token in enumerate(tiny.tokens(60)):
        cache.mode = "decode"
        tiny.forward(pair.model, cache, [[token]], starts=[t])
    for layer in range(2):
        assert cache.held[layer] == pytest.approx([list(compression.trace(0, 60, layer, [0, 1]))[-1][1]])
    assert cache.peaks[0] <= compression.peak_slots(0, 60, [0, 1])


@pytest.mark.parametrize("mode", ["cache", "simulate"])
def test_continuations_of_one_context_do_not_see_each_other(mode: str, profiles: Profiles) -> None:
    pair = tiny.pair("llama")
    settings = {"method": "head_aware", "profile": profiles("llama", MIXED), "mode": mode, **WINDOWS}
    contexts, continuations = [tiny.tokens(40), tiny.tokens(22, seed=3)], [[[3, 9, 4], [7], [8, 8]], [[5, 6, 7, 8]]]
    together, cache = score_continuations(pair.model, lambda: pair.cache(**settings), contexts, continuations, 1)
    for context, group, scores in zip(contexts, continuations, together, strict=True):
        for continuation, (score, _) in zip(group, scores, strict=True):
            ((alone, _),) = score_continuations(
                pair.model, lambda: pair.cache(**settings), [context], [[continuation]], 1
            )[0][0:1][0]
            assert score == pytest.approx(alone, abs=1e-4)
    if mode == "simulate":
        row = [*contexts[0], 3, 9, 4]
        logits = stock_logits("llama", row, shown(MIXED, len(row), 4, WINDOWS))[39:42].log_softmax(-1)
        assert together[0][0][0] == pytest.approx(sum(logits[i, t].item() for i, t in enumerate((3, 9, 4))), abs=1e-4)
        assert cache.stores[0].length == 40


def test_compensation_tokens_and_skipped_layers_go_with_windows_of_heads(profiles: Profiles) -> None:
    pair = tiny.pair("llama")
    settings = {"method": "head_aware", "profile": profiles("llama"), **WINDOWS, "gathering_window": 20}
    cache = pair.cache(**settings, evicted="compensate", weight="uniform", block_size=16, skip_layers="0")
    tiny.forward(pair.model, cache, [tiny.tokens(50)])
    assert cache.held == [[50], [pytest.approx((23 + 0) / 2)]]
    assert [len(head) for head in tiny.kept(cache, 1)] == [23, 0]
    simulated = pair.cache(**settings, mode="simulate", skip_layers="0,1")
    full = pair.cache(method="full")
    a, b = (tiny.forward(pair.model, c, [tiny.tokens(50)]) for c in (simulated, full))
    assert (a - b).abs().max() <= 1e-5


# --- numbers and refusals -------------------------------------------------------------------------------------------


def test_numbers_are_means_over_query_heads_and_unions_over_kv_heads(profiles: Profiles) -> None:
    method = tiny.compression(method="head_aware", profile=profiles("llama", MIXED), **WINDOWS).method
    kinds = {"positional": 9, "mixed": 16, "dead": 1, "gathering": 100}
    assert method.effective_context(100) == sum(kinds[kind] for layer in MIXED for kind in layer) / 8
    assert method.cache_slots(100) == (16 + 9 + 100 + 16) / 4
    assert method.effective_context(7) == (7 * 6 + 2) / 8
    uniform = tiny.compression(method="head_aware", preset="B_streaming", base_window=64).method
    assert uniform.effective_context(1000) == uniform.cache_slots(1000) == 64


def test_a_simulation_says_that_it_saves_nothing_and_what_a_cache_would_hold(profiles: Profiles) -> None:
    pair = tiny.pair("llama")
    settings = {"method": "head_aware", "profile": profiles("llama"), **WINDOWS}
    compression = tiny.compression(**settings, mode="simulate")
    (warning,) = [w for w in compression.method.warnings(pair.facts) if "mode=simulate" in w]
    assert "memory and speed are those of the full cache" in warning and "slots per KV head" in warning
    sizes = {}
    for mode in ("simulate", "cache"):
        cache = pair.cache(**settings, mode=mode)
        tiny.forward(pair.model, cache, [tiny.tokens(60)])
        sizes[mode] = cache.snapshot()
    assert sizes["simulate"]["kept_fraction"] == sizes["cache"]["kept_fraction"]
    assert sizes["simulate"]["compressed"] == [True]
    assert sizes["simulate"]["kv_bytes_valid"][0] == pytest.approx(
        sizes["cache"]["kv_bytes_valid"][0] / sizes["cache"]["kept_fraction"][0]
    ), "valid bytes of a simulation are those of the full cache"


def test_results_name_the_profile_by_its_contents(profiles: Profiles) -> None:
    settings = tiny.compression(method="head_aware", profile=profiles("llama")).settings()
    assert len(settings["profile_sha256"]) == 64 and settings["profile_model"] == "tiny llama"
    assert settings["profile_heads"] == {"positional": 2, "mixed": 2, "gathering": 2, "dead": 2}
    assert "slots" not in settings


def test_a_profile_of_another_model_is_refused(profiles: Profiles) -> None:
    model = tiny.build("gpt_neox")
    for path, why in ((profiles("llama"), "4 query and 2 KV"), (profiles("gpt_neox", EQUAL[:1]), "1 layers")):
        with pytest.raises(UserError, match=why):
            wrap(model, tiny.compression(method="head_aware", profile=path))
    assert model.config._attn_implementation == "sdpa", "the model is left as it was"
    wrap(model, tiny.compression(method="head_aware", profile=profiles("gpt_neox")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a profile=FILE"),
        ({"base_window": 0}, "base_window=0 is not a window"),
        ({"base_window": -1}, "that is method=full"),
        ({"base_window": 1, "n_sink": 0}, "nothing but the query's own token"),
        ({"base_window": 4, "preset": "B_streaming"}, "at least 5"),
        ({"base_window": 8, "preset": "G_conf"}, "add profile=FILE"),
        ({"base_window": 8, "mixed_window": 4}, "mixed_window=4 depends on the types"),
        ({"base_window": 8, "max_capacity_prompt": 9}, "max_capacity_prompt=9 has no effect"),
        ({"base_window": 8, "head_budget": "ada"}, "head_budget=ada has no effect"),
        ({"base_window": 8, "mode": "simulate", "compress_every": 4}, "compress_every=4 has no effect"),
        ({"base_window": 8, "mode": "simulate", "evicted": "compensate"}, "evicted=compensate has no effect"),
        ({"base_window": 8, "preset": "C"}, "is not one of: A_window"),
        ({"profile": "no/such.json"}, "there is no such file"),
        ({"profile": True, "preset": "K_uniform", "base_window": 8}, "treats all heads alike"),
        ({"profile": True, "confidence": 0.5}, "confidence and base_window go together"),
        ({"profile": True, "confidence": 1.5, "base_window": 8}, "outside"),
        ({"profile": True, "trigger": "excess"}, "trigger=excess has no effect"),
        ({"profile": True, "n_sink": -1}, "n_sink=-1 is negative"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(
    settings: dict[str, object], message: str, profiles: Profiles
) -> None:
    if settings.get("profile") is True:
        settings = {**settings, "profile": profiles("llama")}
    with pytest.raises(UserError, match=message):
        tiny.compression(method="head_aware", **settings)
