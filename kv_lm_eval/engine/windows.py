"""Text in windows of which each is one plain forward from an empty cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

Call = Callable[[torch.Tensor, int], torch.Tensor]  # ids [B, q], k -> logits of the last k columns [B, k, V]


class Window(NamedTuple):
    """Tokens that follow each other in the text; every target is scored; `start` is the first target's index."""

    context: list[int]
    targets: list[int]
    start: int


def strided(tokens: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """Windows of `length` tokens, each `stride` further; a token is scored in the first window that it appears in.

    The text's first token has no context and is not scored; with stride = length, the first of each window is not.

    Reference: huggingface.co/docs/transformers/perplexity.
    Deviations: the mean is over the tokens scored; the page weights each window's mean by one token less.
    """
    done = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        first = max(done, begin + 1)
        if first < end:
            yield Window(list(tokens[begin:first]), list(tokens[first:end]), first)
        done = end
        if end == len(tokens):
            return


class Plain(NamedTuple):
    """Plain forwards: `call` is one of right-padded rows, of at most `batch_size`; dtype of the softmax, None for that
    of the logits."""

    call: Call
    batch_size: int
    device: torch.device | str
    dtype: torch.dtype | None = None


@torch.inference_mode()
def score_windows(
    plain: Plain,
    windows: Sequence[Window],
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities [n] in nats and whether each was the most likely token [n], for the targets of each window.

    Args:
        progress: called with the targets scored by each forward.
    """
    out = []
    for start in range(0, len(windows), plain.batch_size):
        batch = windows[start : start + plain.batch_size]
        rows = [[*w.context, *w.targets][:-1] for w in batch]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = torch.tensor(row)
        skipped = min(len(w.context) for w in batch) - 1
        logits = plain.call(ids.to(plain.device), ids.shape[1] - skipped)
        for b, window in enumerate(batch):
            own = logits[b, len(window.context) - 1 - skipped : len(rows[b]) - skipped]
            wanted = torch.tensor(window.targets, device=own.device)
            log_probs = own.log_softmax(-1, dtype=plain.dtype).gather(1, wanted[:, None]).squeeze(1)
            out.append((log_probs.float().cpu(), (own.argmax(-1) == wanted).cpu()))
        progress(sum(len(w.targets) for w in batch))
    return out
