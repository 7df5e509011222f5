"""The sink of a text and the rank of norms, against a model whose attention is made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from kv_lm_eval.analysis import find_sinks

TOKENS = 8


def model(keys: torch.Tensor, received: torch.Tensor) -> Any:
    """Every query gives each key `received` [heads, keys]; keys are [KV heads, keys, size]; logits are uniform."""

    def forward(ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        attention = received[None, :, None].expand(1, -1, ids.shape[1], -1)
        cache = SimpleNamespace(layers=[SimpleNamespace(keys=keys[None])])
        return SimpleNamespace(logits=torch.zeros(1, ids.shape[1], 50), past_key_values=cache, attentions=(attention,))

    return forward


def test_the_sink_is_where_the_later_queries_look_and_low_norms_are_ranked_against_it() -> None:
    generator = torch.Generator().manual_seed(0)
    received = torch.rand(4, TOKENS, generator=generator)
    received[:, 2] += 5
    keys = torch.randn(2, TOKENS, 6, generator=generator)
    keys[:, 0] *= 0.01
    found = find_sinks.look(model(keys, received), list(range(10, 10 + TOKENS)), None)
    assert (found["sink"], found["token"]) == (2, 12)
    assert found["first_four"] == pytest.approx(float(received.mean(0)[:4].sum()))
    half = TOKENS // 2
    by_head = [
        spearmanr(keys[head].norm(dim=-1)[:half], received[2 * head : 2 * head + 2].mean(0)[:half])[0]
        for head in (0, 1)
    ]
    assert found["norm_correlation"] == pytest.approx([sum(by_head) / 2])
    assert found["first_has_lowest_norm"] == [1.0]
    assert found["nll"] == pytest.approx([3.912] * (TOKENS - 1), abs=1e-3), "nothing comes before the first token"


def test_a_prefix_lets_the_first_token_be_scored_and_counts_as_token_0() -> None:
    received = torch.eye(1, TOKENS + 1)
    found = find_sinks.look(model(torch.ones(1, TOKENS + 1, 2), received), list(range(TOKENS)), 7)
    assert (found["sink"], found["token"], len(found["nll"])) == (0, 7, TOKENS)


def test_the_command_on_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The traveller asked for the road home, and nobody knew it. " * 8)
    argv = ["--text", str(text), "--tokens", "48", "--picture", str(tmp_path / "sinks.png")]
    assert find_sinks.main(argv) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == ["none", "bos"] and (tmp_path / "sinks.png").is_file()
    assert find_sinks.main(["--text", str(text), "--prefix", "999999"]) == 2
    assert "is no token here" in capsys.readouterr().err
