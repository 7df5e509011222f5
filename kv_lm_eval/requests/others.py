"""Requests that are answered under other compressions on the way: runs of one comparison share each prompt's prefill.

The run that lm-eval asks goes on as it would alone. Beside it the same requests are answered for the others, whose
answers and records are kept where their own runs will find them; what is not found there they run themselves. So
nothing depends on this but time, and where the others stand in the way they are let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kv_lm_eval.engine.together import may_share
from kv_lm_eval.requests.halving import free_memory, out_of_memory
from kv_lm_eval.requests.run import Run, log

T = TypeVar("T")


class Others:
    """The runs beside a run.

    Args:
        beside: the same requests under other compressions of the same model; those that cannot share are left out.
    """

    def __init__(self, run: Run, beside: Sequence[Run]) -> None:
        self._run = run
        alike = [other for other in beside if _shares(other) and other.question_first == run.question_first]
        self._others = alike if alike and _shares(run) else []

    @property
    def runs(self) -> list[Run]:
        """The run and those beside it."""
        return [self._run, *self._others]

    def served(self, rows: int, work: Callable[[list[Run]], list[T]], shared: bool = True) -> list[tuple[Run, T]]:
        """A batch of so many rows for all of them, or for the run alone: each with its result, the run's own first.

        Args:
            work: runs a batch for some runs, the first of which is the run's own.
            shared: whether the batch can be run for several.
        """
        if not shared or not self._others:
            return [(self._run, work([self._run])[0])]
        try:
            return list(zip(self.runs, work(self.runs), strict=True))
        except Exception as error:
            if out_of_memory(error) and rows > 1:  # a smaller batch may do
                raise
            reason = f"{type(error).__name__}: {error}"
        log.warning("%d runs cannot share their prefills any more (%s); each goes on by itself", len(self.runs), reason)
        self._others = []
        free_memory()
        return [(self._run, work([self._run])[0])]


def _shares(run: Run) -> bool:
    if run.new_cache is None or run.decoder is not None or run.engine.fidelity:
        return False
    return may_share(run.new_cache())
