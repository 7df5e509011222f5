"""Which pairs kvpress keeps, read a second time in numpy, with nothing of this project.

Source: NVIDIA/kvpress 0.5.5, presses/scorer_press.py (int(k_len * (1 - ratio)) of each head's best), adakv_press.py and
the scorer's own file. Keys, values, queries before their rotation and attention weights are the stock model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Layer:
    """What a press is given of a layer."""

    keys: Array  # [K, n, d], rotated
    values: Array  # [K, n, d]
    queries: Array  # [H, n, d], before their rotation
    attention: Array  # [H, n, n]
    theta: float


def knorm(layer: Layer) -> Array:
    return -np.sqrt((layer.keys**2).sum(-1))


def keydiff(layer: Layer) -> Array:
    unit = layer.keys / np.linalg.norm(layer.keys, axis=-1, keepdims=True)
    anchor = unit.mean(1, keepdims=True)
    return -(unit * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1)


def streaming_llm(layer: Layer, kept: int) -> Array:
    scores = np.ones(layer.keys.shape[:2])
    scores[:, 4 : 4 + scores.shape[1] - kept] = 0
    return scores


def tova(layer: Layer) -> Array:
    """The newest token, which has no rank of its own, stays in any case."""
    weights = layer.attention[:, -1, :-1].mean(0)
    return np.tile(np.append(weights, weights.max() + 1), (len(layer.keys), 1))


def snapkv(layer: Layer, window: int = 64, kernel: int = 5) -> Array:
    heads, n = len(layer.keys), layer.keys.shape[1]
    votes = layer.attention[:, -window:, :-window].mean(1)  # [H, n - window]
    padded = np.pad(votes, ((0, 0), (kernel // 2, kernel // 2)))
    pooled = sum(padded[:, i : i + n - window] for i in range(kernel)) / kernel
    scores = pooled.reshape(heads, -1, n - window).mean(1)
    return np.concatenate([scores, np.full((heads, window), scores.max() + 1)], axis=1)


def lagkv(layer: Layer, sinks: int = 4, lag: int = 128) -> Array:
    heads, n, _ = layer.keys.shape
    scores = np.ones((heads, n))
    if n < sinks + 2 * lag:
        scores[:, sinks:] = np.arange(n - sinks) / (n - sinks)
        return scores
    for start in range(sinks, n - 2 * lag + 1, lag):
        if start + 2 * lag > sinks + (n - sinks) // lag * lag:
            break
        for head in range(heads):
            both = 0.0
            for states in (layer.keys[head], layer.values[head]):
                here, after = states[start : start + lag], states[start + lag : start + 2 * lag]
                scaled = (here - after.min(0)) / (after.max(0) - after.min(0))
                spread = scaled.std(-1, ddof=1)
                both += np.exp(spread - spread.max()) / np.exp(spread - spread.max()).sum()
            scores[head, start : start + lag] = both.argsort().argsort() / lag
    return scores


def observed_attention(layer: Layer) -> Array:
    heads, n, _ = layer.keys.shape
    return (layer.attention.sum(1) / np.arange(n, 0, -1)).reshape(heads, -1, n).mean(1)


def cur(layer: Layer, window: int = 16, sinks: int = 4) -> Array:
    shares = []
    for states in (layer.keys, layer.values):
        squares = (states**2).sum(-1)
        for start in range(0, squares.shape[1], window):
            squares[:, start : start + window] /= squares[:, start : start + window].sum(1, keepdims=True)
        shares.append(squares)
    scores = shares[0] * shares[1]
    scores /= scores.sum(1, keepdims=True)
    scores[:, :sinks] = 1.0
    return scores


def chunkkv(scores: Array, removed: float, length: int = 20) -> set[int]:
    """ChunkKVPress, one set for all heads: a share of the chunks, the last of which may be shorter."""
    n = scores.shape[1]
    chunks = [range(start, min(n, start + length)) for start in range(0, n, length)]
    order = sorted(chunks, key=lambda chunk: -scores[:, chunk.start : chunk.stop].sum(0).mean())
    return {token for chunk in order[: max(1, int(len(chunks) * (1 - removed)))] for token in chunk}


def expected_attention(layer: Layer, epsilon: float = 0.01, sinks: int = 4, ahead: int = 512) -> Array:
    heads, n, d = layer.keys.shape
    rates = layer.theta ** -(np.arange(0, d, 2) / d)
    angles = np.outer(np.arange(n, n + ahead), rates)
    cos, sin, eye = np.cos(angles).mean(0), np.sin(angles).mean(0), np.eye(d // 2)
    turn = np.block([[cos * eye, -sin * eye], [sin * eye, cos * eye]])
    group = len(layer.queries) // heads
    scores = np.zeros((heads, n - sinks))
    for head in range(heads):
        keys = layer.keys[head, sinks:]
        for queries in layer.queries[head * group : (head + 1) * group, sinks:]:
            mean = turn @ queries.mean(0)
            centred = queries - queries.mean(0)
            covariance = turn @ (centred.T @ centred / len(centred)) @ turn.T
            logits = keys @ mean / math.sqrt(d) + np.einsum("ni,ij,nj->n", keys, covariance, keys) / d / 2
            scores[head] += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() / group
    scores = (scores + epsilon) * np.linalg.norm(layer.values[:, sinks:], axis=-1)
    return np.concatenate([np.full((heads, sinks), scores.max() + 1), scores], axis=1)


def n_kept(n: int, removed: float) -> int:
    return max(1, int(n * (1 - removed)))


def adakv(scores: Array, kept: int, sure: float = 0.2) -> list[set[int]]:
    """AdaKVPress, in plain loops: a floor for each head, then the best of all heads together."""
    heads, n = scores.shape
    floor = max(1, int(kept * sure))
    ranked = []
    for head in range(heads):
        order = sorted(range(n), key=lambda t: (-scores[head, t], t))
        for place, token in enumerate(order):
            ranked.append((place >= floor, -scores[head, token], head, token))
    ranked.sort()
    stays: list[set[int]] = [set() for _ in range(heads)]
    for _, _, head, token in ranked[: heads * kept]:
        stays[head].add(token)
    return stays
