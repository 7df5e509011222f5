"""The self-check: what cannot be served exactly is refused with the reason, and the model is left as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import tiny
import torch
import transformers as tf
from on_device import DEVICE

from kv_lm_eval.cache import attention, kernels
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine import positions as probes
from kv_lm_eval.engine.check import Roads, wrap
from kv_lm_eval.engine.choices import score_packed
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.errors import UserError

IN_CACHE = tiny.compression(method="streaming_llm", window_size=8)
ABSOLUTE = tiny.compression(method="streaming_llm", window_size=8, positions="absolute")


def falcon() -> tf.PretrainedConfig:
    return tf.FalconConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def bloom() -> tf.PretrainedConfig:
    return tf.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4)


def deepseek() -> tf.PretrainedConfig:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    dense = {"first_k_dense_replace": 2, "num_key_value_heads": 4, "intermediate_size": 48}
    return tf.DeepseekV3Config(**{**tiny.COMMON, **ranks, **dense, "num_attention_heads": 4})


def shared_kv() -> tf.PretrainedConfig:
    return tf.Gemma3nTextConfig(
        **{**tiny.COMMON, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8},
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=tiny.VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=2,
    )


def dynamic() -> tf.PretrainedConfig:
    return tf.LlamaConfig(
        **{**tiny.LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    )


def made(config: Callable[[], tf.PretrainedConfig]) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config()).float().eval().to(DEVICE)


@torch.inference_mode()
def answer(model: tf.PreTrainedModel) -> tuple[torch.Tensor, list[int]]:
    ids = torch.tensor([tiny.tokens(12)])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    return model(input_ids=ids).logits, new.tolist()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (falcon, "FalconForCausalLM does not let its attention function be chosen"),
        (bloom, "BloomForCausalLM does not let its attention function be chosen"),
        (deepseek, "multi-head latent attention"),
        (shared_kv, "share one cache between layers|shares caches between layers"),
    ],
    ids=lambda c: getattr(c, "__name__", ""),
)
def test_architectures_that_would_run_silently_wrong_are_refused_and_left_as_they_were(
    config: Callable[[], tf.PretrainedConfig], words: str
) -> None:
    model = made(config)
    before, name = answer(model), model.config._attn_implementation
    with pytest.raises(UserError, match=words):
        wrap(model, FULL)
    after = answer(model)
    assert model.config._attn_implementation == name
    assert torch.equal(before[0], after[0]) and before[1] == after[1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny.build("gpt2"), "learned positions"),
        (lambda: tiny.build("mistral_sliding"), "all of its layers are sliding windows of 24 tokens"),
        (lambda: made(dynamic), "change with the length"),
    ],
    ids=["learned positions", "all layers sliding", "dynamic frequencies"],
)
def test_in_cache_positions_are_refused_where_the_sinks_cannot_follow(
    model: Callable[[], tf.PreTrainedModel], words: str
) -> None:
    built = model()
    before, name = answer(built), built.config._attn_implementation
    with pytest.raises(UserError, match=words) as caught:
        wrap(built, IN_CACHE)
    assert "positions=absolute" in str(caught.value), "the remedy is named"
    assert built.config._attn_implementation == name
    after = answer(built)
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    wrap(built, ABSOLUTE)


def deep() -> tf.PreTrainedModel:
    """In bfloat16 further from itself than the bound of the format, as Gemma-3-270M is."""
    return tiny.build("llama", num_hidden_layers=48).to(torch.bfloat16)


def test_a_model_that_is_as_far_from_itself_as_from_us_is_served() -> None:
    wrap(deep(), FULL)


@pytest.mark.parametrize("build", [lambda: tiny.build("llama"), deep, lambda: tiny.build("llama").bfloat16()])
def test_a_model_whose_logits_differ_through_our_attention_is_refused(
    build: Callable[[], tf.PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    for module in (attention, kernels):
        monkeypatch.setattr(
            module, "packed_queries", lambda query, kv_heads: 1.5 * query.reshape(query.shape[0], kv_heads, -1, 8)
        )
    with pytest.raises(UserError, match="LlamaForCausalLM does not pass the self-check.*logits"):
        wrap(model, FULL)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_can_be_wrapped_again_for_another_method() -> None:
    model, stock = tiny.build("llama"), tiny.build("llama")
    wrap(model, FULL)
    facts = wrap(model, IN_CACHE)
    row = tiny.tokens(30)
    with torch.inference_mode():
        got = model(input_ids=torch.tensor([row]), **tiny.given(CompressedCache(FULL, facts))).logits
        expected = stock(input_ids=torch.tensor([row])).logits
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", tiny.CORE)
def test_the_self_check_says_which_layers_slide(name: str) -> None:
    expected = {"mistral_sliding": [24, 24], "gemma3": [24, None]}.get(name, [None, None])
    facts = tiny.pair(name).facts
    assert facts.sliding_windows == expected
    assert [facts.compressible(i) for i in range(2)] == ([False, True] if name == "gemma3" else [True, True])
    assert facts.all_sliding == (name == "mistral_sliding")
    assert facts.qk_norm == (name in ("qwen3", "gemma3"))


SCALED = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [1, 4])
def test_queries_that_grow_with_their_place_are_no_rotation(layers: int, dtype: torch.dtype) -> None:
    """Nothing tells of it in the keys of a single layer."""
    if not hasattr(tf, "Ministral3Config"):
        pytest.skip("transformers has no Ministral3 yet")
    own = {"num_hidden_layers": layers, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "head_dim": 8}
    rope = {"rope_parameters": {**SCALED, "original_max_position_embeddings": 128}}
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.Ministral3Config(**{**tiny.LLAMA, **own, **rope}), dtype=dtype)
    with pytest.raises(UserError, match="cannot be moved|position_ids"):  # or, before 5.21, does not hand them over
        wrap(model.eval().to(DEVICE), IN_CACHE)


def test_positions_that_enter_in_a_later_layer_are_no_rotation() -> None:
    model, places = tiny.build("llama", num_hidden_layers=3), torch.nn.Embedding(4096, 32).to(DEVICE)

    def add(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args[0] + places(kwargs["position_ids"]), *args[1:]), kwargs

    model.model.layers[1].register_forward_pre_hook(add, with_kwargs=True)
    with pytest.raises(UserError, match="cannot be moved"):
        wrap(model, IN_CACHE)


def test_the_probe_leaves_no_hooks() -> None:
    model = tiny.build("llama")
    wrap(model, IN_CACHE)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks or type(module) is torch.nn.Linear


def test_a_deep_model_in_half_precision_rotates_too() -> None:
    """Rounding adds up over layers: Llama-3.1-8B's keys, on an H200 in bfloat16, were 5.6 % apart in its last layer."""
    model = tiny.build("llama", seed=2, num_hidden_layers=20).to(torch.bfloat16)
    facts = wrap(model, IN_CACHE)
    assert facts.rope is not None and facts.rope_kinds == ["rope"] * 20
    base, moved = (probes._heads_of(model, facts, range(start, start + 16))[-1].key.float() for start in (0, 600))
    turned = facts.rope.rotate(base, torch.full((1, 1), 600, device=base.device), 19)
    assert (turned - moved).norm() > 0.06 * moved.norm(), "whole forwards tell nothing of a rotation here"


def test_layers_whose_keys_ignore_positions_are_told_from_those_that_rotate_them() -> None:
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = tf.SmolLM3Config(**{**tiny.LLAMA, "no_rope_layers": [1, 0], **special})
    facts = wrap(tf.AutoModelForCausalLM.from_config(config).eval().to(DEVICE), IN_CACHE)
    assert facts.rope_kinds == ["rope", "nope"]


def test_a_wrapped_model_without_a_compressed_cache_says_what_is_wrong() -> None:
    pair = tiny.pair("llama")
    with pytest.raises(UserError, match="called without one"):
        pair.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)


def test_a_ready_made_4d_mask_is_refused() -> None:
    pair = tiny.pair("llama")
    with pytest.raises(UserError, match="4D attention mask"):
        pair.model(
            input_ids=torch.tensor([[1, 2, 3]]),
            attention_mask=torch.zeros(1, 1, 3, 3),
            **tiny.given(pair.cache(method="full")),
        )


def test_training_mode_with_dropout_is_refused() -> None:
    model = tiny.build("llama", attention_dropout=0.1)
    facts = wrap(model, FULL)
    model.train()
    with pytest.raises(UserError, match="training mode"):
        model(input_ids=torch.tensor([[1, 2, 3]]), **tiny.given(CompressedCache(FULL, facts)))


def whole_prompt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets generate() forget that a part of the prompt has been fed, as transformers 5.24 did."""
    original = tf.LlamaForCausalLM.prepare_inputs_for_generation

    def prepare(self, input_ids, next_sequence_length=None, **kwargs):  # type: ignore[no-untyped-def]
        return original(self, input_ids, next_sequence_length=None if next_sequence_length != 1 else 1, **kwargs)

    monkeypatch.setattr(tf.LlamaForCausalLM, "prepare_inputs_for_generation", prepare)


@pytest.mark.parametrize("roads", [Roads(chunks=True, compiled=True)], ids=str)
def test_a_transformers_that_feeds_a_prefilled_prompt_again_is_refused(
    roads: Roads, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_prompt_again(monkeypatch)
    wrap(tiny.build("llama"), FULL)  # the settings do not go that way
    with pytest.raises(UserError, match="generate\\(\\) after chunks"):
        wrap(tiny.build("llama"), FULL, roads)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_road_is_walked_without_complaint(name: str) -> None:
    for chunks, question, compiled in itertools.product((False, True), repeat=3):
        wrap(tiny.build(name), FULL, Roads(chunks, question, compiled))


def test_choices_that_are_scored_wrongly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_wrong_row(model, cache, first, continuations, how):  # type: ignore[no-untyped-def]
        return score_packed(model, cache, {0: first[1], 1: first[0]}, continuations, how)

    monkeypatch.setattr("kv_lm_eval.engine.check.score_packed", of_the_wrong_row)
    with pytest.raises(UserError, match="continuations over one prefill differ"):
        wrap(tiny.build("llama"), FULL)


def test_transformers_finds_as_many_growing_layers_as_the_model_has() -> None:
    """generate() and the models look at the layers of a cache: an empty list is all of everything."""
    cache = tiny.pair("llama").cache(method="full")
    assert len(cache.layers) == len(cache) == 2
    for question in ("is_linear", "is_sliding", "is_dummy"):
        if hasattr(cache, question):
            assert getattr(cache, question) == [False, False]
    assert not cache.is_compileable and not all(layer.is_croppable for layer in cache.layers)


def in_the_mask_only(**settings: object) -> tf.PreTrainedModel:
    """A model that hands its window to the mask alone, not to the attention function."""
    torch.manual_seed(0)
    config = tf.Qwen2MoeConfig(
        **{**tiny.LLAMA, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=300,
        max_window_layers=1,
        **settings,
    )
    return tf.AutoModelForCausalLM.from_config(config).float().eval().to(DEVICE)


def test_a_window_that_only_the_mask_knows_is_served_exactly_beyond_the_check() -> None:
    model, stock = in_the_mask_only(), in_the_mask_only()
    facts = wrap(model, FULL)
    assert set(facts.sliding_windows) == {None, 300}
    row = tiny.tokens(400)
    with torch.inference_mode():
        got = model(input_ids=torch.tensor([row]), **tiny.given(CompressedCache(FULL, facts))).logits
        expected = stock(input_ids=torch.tensor([row])).logits
    assert (got - expected).abs().max() <= 1e-4


def test_phimoe_and_its_window() -> None:
    def made_so() -> tf.PreTrainedModel:
        torch.manual_seed(0)
        config = tf.PhimoeConfig(**{**tiny.LLAMA, "num_local_experts": 2}, sliding_window=60, pad_token_id=0)
        return tf.AutoModelForCausalLM.from_config(config).float().eval().to(DEVICE)

    model, stock = made_so(), made_so()
    facts = wrap(model, FULL)
    assert facts.sliding_windows == [60, 60]
    row = tiny.tokens(130)
    with torch.inference_mode():
        got = model(input_ids=torch.tensor([row]), **tiny.given(CompressedCache(FULL, facts))).logits
        assert (got - stock(input_ids=torch.tensor([row])).logits).abs().max() <= 1e-4


def test_attention_within_chunks_is_refused() -> None:
    torch.manual_seed(0)
    config = tf.Llama4TextConfig(
        **{**tiny.LLAMA, "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2},
        attention_chunk_size=100,
        no_rope_layers=[1, 0],
    )
    with pytest.raises(UserError, match="Llama4ForCausalLM.*within chunks"):
        wrap(tf.AutoModelForCausalLM.from_config(config).float().eval().to(DEVICE), FULL)


@pytest.mark.parametrize("positions", [64, 512])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_no_table_is_asked_beyond_its_end(name: str, positions: int) -> None:
    """A CPU says so and it can be caught; a GPU is lost to the process."""
    if name == "opt":
        sizes = {"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32, "pad_token_id": 1}
        config = tf.OPTConfig(**{**tiny.COMMON, **sizes, "max_position_embeddings": positions})
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().to(DEVICE)
    else:
        model = tiny.build(name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": positions})
    asked = list[int]()

    def look(module: torch.nn.Embedding, args: tuple[torch.Tensor, ...]) -> None:
        asked.append(int(args[0].max()))
        assert asked[-1] < module.num_embeddings

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(look)
    for compression in (IN_CACHE, ABSOLUTE, tiny.compression(**tiny.example("snapkv_comp", 16), key_space="pre_rope")):
        moves = compression.moves_keys is not None
        if moves and name != "llama":
            with pytest.raises(UserError, match="its keys cannot be moved by a rotation"):
                wrap(model, compression)
        else:
            wrap(model, compression)
    assert asked
