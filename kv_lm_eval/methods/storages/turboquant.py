"""Vectors turned at random, so that one codebook fits all their coordinates.

Shapes: B batch rows, K KV heads, n pairs, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import erf, exp, pi, sqrt

import torch

from kv_lm_eval.cache.coded import Coded, pack, unpack
from kv_lm_eval.methods.storage import Apart, PairByPair

BITS = (2, 3, 4)


@dataclass(frozen=True)
class TurboQuant(PairByPair):
    """Keys and values as a norm in float16 and, for each coordinate of the turned unit vector, its nearest codeword.

    x / |x| is turned by a random rotation, the same for all tokens, heads and layers; then each of its D coordinates is
    nearly a draw from N(0, 1/D), whatever x was, and is held in nbits as the nearest of 2^nbits codewords: the best
    scalar quantiser of that distribution (Lloyd-Max), known beforehand. Read back it is turned back and has its norm.

    `qjl=True` takes one of the bits for the sign of a random projection of what is left, whose norm is a second
    float16: products with a query then are right on average, and less exact one by one.

    Paper: arXiv:2504.19874 (TurboQuant), algorithms 1 and 2; the sign bits are those of arXiv:2406.03482 (QJL).
    Deviations: codewords are those of N(0, 1/D), the paper's limit for large D, at every D. No channels with more bits
    than others (the paper's 2.5 and 3.5 bits), no entropy code. Inference engines' forms of that name
    (vLLM's turboquant_4bit_nc and others) are other codes: values in equal steps, vectors brought back to their norm.
    """

    nbits: int = field(default=4, metadata={"help": "turboquant: bits of each key and value number", "choices": BITS})
    k_bits: int | None = field(default=None, metadata={"help": "nbits of keys alone", "choices": BITS})
    v_bits: int | None = field(default=None, metadata={"help": "nbits of values alone", "choices": BITS})
    qjl: bool = field(
        default=False, metadata={"help": "turboquant: one bit of each number for the sign of the projected residual"}
    )
    rotation_seed: int = field(default=0, metadata={"help": "turboquant: another seed, another rotation"})

    @property
    def keys(self) -> Rotated:
        return Rotated(self.k_bits or self.nbits, self.qjl, self.rotation_seed)

    @property
    def values(self) -> Rotated:
        return Rotated(self.v_bits or self.nbits, self.qjl, self.rotation_seed)


@dataclass(frozen=True)
class Rotated(Apart):
    """Codes of the turned coordinates, packed along the head, and norms in float16."""

    nbits: int
    qjl: bool
    seed: int

    block = 1

    @property
    def bits(self) -> int:
        """Of a codeword."""
        return self.nbits - self.qjl

    def tables(self, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The codebook [2^bits], the rotation [D, D], and with the sign bit the projection [D, D]."""
        turned = (codebook(self.bits, device), rotation(size, self.seed, device))
        return (*turned, projection(size, self.seed, device)) if self.qjl else turned

    def encode(self, x: torch.Tensor, real: torch.Tensor, of_head: dict[str, torch.Tensor]) -> Coded:
        """Norms and codes of x [B, K, n, D]; pairs that are not real [B, K, n] are 0."""
        size, device = x.shape[3], x.device
        numbers = x.float().masked_fill(~real.unsqueeze(-1), 0.0)
        norm = numbers.norm(dim=-1, keepdim=True)
        unit = numbers / torch.where(norm == 0, 1.0, norm)
        words = codebook(self.bits, device)
        turned = unit @ rotation(size, self.seed, device).T * sqrt(size)
        codes = torch.bucketize(turned, (words[1:] + words[:-1]) / 2).to(torch.uint8)
        of_pair = {"codes": pack(codes, self.bits), "norm": _half(norm)}
        if self.qjl:
            left = unit - self._turned_back(codes)
            signs = (left @ projection(size, self.seed, device).T >= 0).to(torch.uint8)
            of_pair |= {"signs": pack(signs, 1), "left": _half(left.norm(dim=-1, keepdim=True))}
        return Coded(self, size, x.dtype, of_pair)

    def decode(self, part: Coded) -> torch.Tensor:
        """The pairs again, [B, K, n, D] float32."""
        size, held = part.size, part.of_pair
        unit = self._turned_back(unpack(held["codes"], self.bits)[..., :size])
        if self.qjl:
            signs = unpack(held["signs"], 1)[..., :size].float() * 2 - 1
            back = signs @ projection(size, self.seed, signs.device)
            unit += sqrt(pi / 2) / size * held["left"].float() * back
        return unit * held["norm"].float()

    def _turned_back(self, codes: torch.Tensor) -> torch.Tensor:
        """The unit vectors that codes [B, K, n, D] stand for, in the same shape."""
        size = codes.shape[-1]
        turned = codebook(self.bits, codes.device)[codes.long()] / sqrt(size)
        return turned @ rotation(size, self.seed, codes.device)


@lru_cache(maxsize=32)
def codebook(bits: int, device: torch.device) -> torch.Tensor:
    """[2^bits] float32: the codewords of the best scalar quantiser of N(0, 1), ascending. Each is the mean of what is
    nearest to it (Lloyd-Max)."""
    words = [(2 * i + 1) / 2**bits * 3 - 3 for i in range(2**bits)]

    def density(x: float) -> float:
        return exp(-x * x / 2) / sqrt(2 * pi)

    moved = 1.0
    while moved > 1e-9:
        middles = [(low + high) / 2 for low, high in zip(words, words[1:], strict=False)]
        edges = [float("-inf"), *middles, float("inf")]
        new = []
        for low, high in zip(edges, edges[1:], strict=False):
            share = (erf(high / sqrt(2)) - erf(low / sqrt(2))) / 2
            new.append((density(low) - density(high)) / share)
        moved = max(abs(a - b) for a, b in zip(words, new, strict=True))
        words = new
    return torch.tensor(words, device=device)


@lru_cache(maxsize=32)
def rotation(size: int, seed: int, device: torch.device) -> torch.Tensor:
    """[D, D] float32, orthogonal, each equally likely: from the QR decomposition of Gaussian numbers."""
    q, r = torch.linalg.qr(_gaussian(size, seed)[0])
    return (q * r.diagonal().sign()).float().to(device)


@lru_cache(maxsize=32)
def projection(size: int, seed: int, device: torch.device) -> torch.Tensor:
    """[D, D] float32 draws from N(0, 1)."""
    return _gaussian(size, seed)[1].float().to(device)


def _gaussian(size: int, seed: int) -> torch.Tensor:
    """[2, D, D] float64: the rotation's draws, and the projection's, which must be others."""
    return torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _half(x: torch.Tensor) -> torch.Tensor:
    """Norms [B, K, n, 1] in float16, those beyond its range as its largest number."""
    return x.clamp_max(torch.finfo(torch.float16).max).half()
