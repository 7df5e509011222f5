"""The most slots a method will ever hold are known before it runs, and it holds exactly as many."""

from __future__ import annotations

import random

import pytest
import tiny

METHODS = {
    **{name: tiny.example(name, 12) for name in tiny.methods(lambda cls: cls.uses_cache)},
    "lazy": {"method": "streaming_llm", "n_sink": 3, "window_size": 8, "compress_every": 6},
    "slack": {
        "method": "streaming_llm",
        "n_sink": 3,
        "window_size": 8,
        "compress_every": 6,
        "cache_slack": 4,
        "max_drop": 3,
    },
    "total": {"method": "streaming_llm", "total_budget": 20, "compress_every": 4},
    "snapkv online": {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 12, "compress_every": 5},
    "snapkv excess": {
        "method": "snapkv",
        "window_size": 4,
        "max_capacity_prompt": 12,
        "compress_every": 5,
        "trigger": "excess",
    },
    "adakv online": {"method": "adakv", "window_size": 4, "max_capacity_prompt": 12, "compress_every": 3},
    "knorm ratio": {"method": "knorm", "keep_ratio": 0.4},
    "knorm per step": {"method": "knorm", "keep_ratio": 0.8, "prune_after": 16, "compress_every": 1},
    "tova skipping": {"method": "tova", "max_capacity_prompt": 12, "skip_layers": [0]},
    "random online": {"method": "random", "max_capacity_prompt": 12, "compress_every": 7},
    "snapkv quantized": {
        "method": "snapkv",
        "window_size": 4,
        "max_capacity_prompt": 12,
        "nbits": 4,
        "residual_length": 4,
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_the_declared_peak_is_the_peak(name: str) -> None:
    pair, draw = tiny.pair("llama"), random.Random(name)
    for prompt, new in [(draw.randint(1, 45), draw.randint(1, 25)) for _ in range(4)]:
        cache = pair.cache(**METHODS[name])
        row = tiny.tokens(prompt + new)
        tiny.forward(pair.model, cache, [row[:prompt]])
        for t in range(prompt, prompt + new):
            tiny.forward(pair.model, cache, [[row[t]]], [t])
        compression = tiny.compression(**METHODS[name])
        declared = compression.peak_slots(prompt, new, pair.facts.cut_layers)
        if compression.open:  # what scores decide is known no better than that it may be all
            assert prompt <= cache.peaks[0] <= declared, (prompt, new)
        else:
            assert cache.peaks == [declared], (prompt, new)
