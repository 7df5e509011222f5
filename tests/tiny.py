"""Random models of a few layers, built in code: enough to prove what the cache does, in a fraction of a second."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import transformers as tf
from on_device import DEVICE

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts, Words
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.config import parse
from kv_lm_eval.engine import again
from kv_lm_eval.engine.check import wrap as check_and_wrap
from kv_lm_eval.engine.forward import cache_argument, logits_of
from kv_lm_eval.engine.prefill import forward as engine_forward
from kv_lm_eval.engine.prefill import prefill as engine_prefill
from kv_lm_eval.methods import base, evicted
from kv_lm_eval.methods.compression import Compression

VOCAB = 97
COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
LLAMA = {**COMMON, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def build(name: str, seed: int = 0, **overrides) -> tf.PreTrainedModel:
    """A random float32 model in eval mode; the weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    config = CONFIGS[name](**overrides)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if name != "gemma2" else "eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            else:  # biases are not all zero and norms not all one, so that key norms differ behind a key norm too
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model.float().eval().to(DEVICE)


CONFIGS = {
    "llama": lambda **o: tf.LlamaConfig(**{**LLAMA, **o}),
    "mistral_sliding": lambda **o: tf.MistralConfig(**{**LLAMA, "sliding_window": 24, "head_dim": 8, **o}),
    "qwen3": lambda **o: tf.Qwen3Config(**{**LLAMA, "head_dim": 8, **o}),
    "gpt_neox": lambda **o: tf.GPTNeoXConfig(**{**COMMON, "intermediate_size": 48, "num_attention_heads": 4, **o}),
    "gemma3": lambda **o: tf.Gemma3TextConfig(
        **{**LLAMA, "head_dim": 8, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], **o}
    ),
    "gpt2": lambda **o: tf.GPT2Config(
        **{
            **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
            **{"bos_token_id": None, "eos_token_id": None, **o},
        }
    ),
    "gemma2": lambda **o: tf.Gemma2Config(
        **{
            **LLAMA,
            "head_dim": 8,
            "sliding_window": 24,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 20.0,
            **o,
        }
    ),
}
CONFIGS |= {
    "phi3": lambda **o: tf.Phi3Config(**{**LLAMA, "sliding_window": 24, "pad_token_id": 0, **o}),
    "starcoder2": lambda **o: tf.Starcoder2Config(**{**LLAMA, "sliding_window": 24, **o}),
}
MIXED = {**LLAMA, "head_dim": 8, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS |= {
    "olmo3": lambda **o: tf.Olmo3Config(**{**{k: v for k, v in MIXED.items() if k != "head_dim"}, **o}),
    "gemma3n": lambda **o: tf.Gemma3nTextConfig(
        **{
            **MIXED,
            **{"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
            **{"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], **o},
        }
    ),
}
CORE = ("llama", "mistral_sliding", "qwen3", "gpt_neox", "gemma3", "gpt2")
FULL_ATTENTION = ("llama", "qwen3", "gpt_neox", "gpt2")
ROPE_FULL_ATTENTION = ("llama", "qwen3", "gpt_neox")  # streaming with in-cache positions is possible and simple


def given(cache: tf.Cache) -> dict[str, tf.Cache]:
    """The argument of forward() or generate() for a cache, by the name that this version of transformers has for it."""
    return {cache_argument(tf.LlamaForCausalLM.forward): cache}


WORDS = Words(lambda text: [1 + ord(c) % (VOCAB - 1) for c in text][-11:])  # a tokenizer of letters, of the last ones

# --- a model under our attention, its untouched twin, and caches for it --------------------------------------------


@dataclass
class Pair:
    """The same weights twice."""

    model: tf.PreTrainedModel  # wrapped: every forward needs a CompressedCache
    stock: tf.PreTrainedModel  # as transformers made it
    facts: ModelFacts

    def cache(self, **settings: object) -> CompressedCache:
        return make_cache(compression(**settings), self.facts)


def wrap(model: tf.PreTrainedModel, compression: Compression) -> ModelFacts:
    """The model under our attention, and what is known of it; a tokenizer of letters for methods that speak to it."""
    facts = check_and_wrap(model, compression)
    facts.words = WORDS
    return facts


@functools.cache
def pair(name: str) -> Pair:
    model, stock = build(name), build(name)
    in_cache = name not in ("gpt2", "mistral_sliding")  # where keys can be moved, the wrap finds out how
    facts = wrap(model, compression(method="streaming_llm", window_size=8) if in_cache else compression(method="full"))
    return Pair(model, stock, facts)


def cases(settings: Mapping[str, dict[str, object]], models: Iterable[str] = CORE) -> list[tuple[str, str]]:
    """Every model with every method; without those that move keys on models that wrap() refuses for them."""
    refused = list(itertools.product(("gpt2", "mistral_sliding"), (n for n, args in settings.items() if moves(**args))))
    return [case for case in itertools.product(models, settings) if case not in refused]


def moves(method: str, **args: object) -> bool:
    """Whether these settings move keys in position, whatever the budget."""
    cls = base.load(method)
    scorer = cls(**{k: v for k, v in args.items() if k in fields_of(cls)})
    return bool(scorer.in_cache_sinks) or scorer.moments_from is not None or scorer.rotates


def compression(**settings: object) -> Compression:
    return parse(dict(settings))[0]


# --- what the method files say of themselves ------------------------------------------------------------------------


def example(method: str, slots: int, **more: object) -> dict[str, object]:
    """The method's own example at so many slots, on its own schedule, and what else is given."""
    settings = base.example(method, slots)
    settings.pop("compress_every", None)
    return {**settings, **more}


def free(method: str, slots: int, **more: object) -> dict[str, object]:
    """The same in a form that goes with any treatment of the evicted and any way to share a budget."""
    own, parts = (
        fields_of(base.load(method)),
        {f for name in evicted.available() for f in fields_of(evicted.load(name))},
    )
    settings = {k: v for k, v in example(method, slots).items() if k in own or k not in parts}
    absolute = {"positions": "absolute"} if "positions" in own else {}
    return {**settings, **absolute, **more}


def methods(which: Callable[[type[base.Method]], bool] = bool) -> list[str]:
    """Names of the methods whose class is of that kind; default all."""
    return [name for name in base.available() if which(base.load(name))]


def fields_of(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def chooses(cls: type[base.Method]) -> bool:
    """It evicts, to a budget that the user names, and moves pairs: the ring overwrites."""
    return cls.compresses and cls.takes_budget and not cls.ring


def tokens(length: int, seed: int = 0) -> list[int]:
    """Token ids that repeat only after all others came: repetitions have keys of the same norm up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [
        1 + i for _ in range(0, length, VOCAB - 1) for i in torch.randperm(VOCAB - 1, generator=generator).tolist()
    ][:length]


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, position_ids of a left-padded batch."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


@torch.inference_mode()
def forward(
    model: tf.PreTrainedModel, cache: tf.Cache, rows: list[list[int]], starts: list[int] | None = None
) -> torch.Tensor:
    """One forward of left-padded rows; explicit positions. Logits of all columns."""
    ids, mask, positions = left_padded(rows)
    if starts is not None:
        positions = positions + torch.tensor(starts)[:, None] * mask
    padding = mask if (mask == 0).any() else None
    logits = logits_of(model, ids, positions=positions, mask=padding, cache=cache)
    if isinstance(cache, CompressedCache) and cache.compression.method.reads_again:
        again.after_forward(cache, rows, lambda tokens: engine_forward(model, cache, tokens, keep=1))
    return logits


def prefill(
    model: tf.PreTrainedModel, new_cache: Callable[[], CompressedCache], rows: list[list[int]]
) -> tuple[CompressedCache, torch.Tensor]:
    """The cache of the prompts and the logits after them, [B, V]."""
    cache, logits = engine_prefill(model, new_cache, rows)
    return cache, torch.cat([logits[b] for b in range(len(rows))])


def kept(cache: CompressedCache, layer: int, row: int = 0) -> list[list[int]]:
    """Original positions in a layer's store: one sorted list per KV head (one, if all hold the same)."""
    segment, place = cache.of_row(row)
    heads = max(s.stores[layer].pos.shape[1] for s in cache.segments)
    return [sorted(p for p in head if p >= 0) for head in segment.stores[layer].pos[place].expand(heads, -1).tolist()]
