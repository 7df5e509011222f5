"""A batch that runs out of memory is halved, down to single rows, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Halving:
    """Runs batches in parts that fit, and remembers what did not.

    Later batches with as many tokens are halved at once; shorter rows, which come later, are tried in full batches.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._too_many_tokens: int | None = None

    def run(
        self,
        rows: Sequence[T],
        work: Callable[[Sequence[T]], R],
        length: Callable[[T], int],
        forgive: Callable[[T], bool] = lambda row: False,
    ) -> Iterator[tuple[Sequence[T], R | None]]:
        """Yields parts of the rows, in order, with their results.

        Args:
            work: runs some rows. length: tokens of a row.
            forgive: whether a row that does not fit alone is given up, with the result None, rather than raised.
        """
        waiting = [rows]
        while waiting:
            part = waiting.pop()
            tokens, middle = len(part) * max(map(length, part)), (len(part) + 1) // 2
            if middle < len(part) and self._too_many_tokens is not None and tokens >= self._too_many_tokens:
                waiting += [part[middle:], part[:middle]]
                continue
            result, failed = None, False
            try:
                result = work(part)
            except RuntimeError as error:
                if not out_of_memory(error) or (len(part) == 1 and not forgive(part[0])):
                    raise
                failed = True
            if failed and len(part) > 1:  # outside the handler, which keeps the failed forward's tensors alive
                self._note(len(part), tokens)
                waiting += [part[middle:], part[:middle]]
                continue
            if failed:
                free_memory()
            yield part, result

    def _note(self, rows: int, tokens: int) -> None:
        if self._too_many_tokens is None:
            self._log.warning(
                "out of memory with %d prompts in a batch (%d tokens): it is halved and the run goes on, as will other "
                "batches of that size. A smaller --batch_size saves the failed attempts.",
                rows,
                tokens,
            )
        self._too_many_tokens = min(tokens, self._too_many_tokens or tokens)
        free_memory()


def largest_batch(attempt: Callable[[int], object], most: int) -> int:
    """The largest of `most`, its half, its quarter ... that `attempt` runs within the memory; at least 1."""
    rows = max(1, most)
    while rows > 1:
        fits = True
        try:
            attempt(rows)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        free_memory()
        if fits:
            break
        rows //= 2
    return rows


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def free_memory() -> None:
    """Gives back what the accelerator's allocator holds for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
