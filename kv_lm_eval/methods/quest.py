from __future__ import annotations

from typing import Any

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, Pages, setting

LEAST = 3  # pages


class Quest(Method):
    """Nothing is evicted: of each layer every query reads the pages of tokens whose keys could match it best.

    A page's bound for a query is the sum over the dimensions of the larger of q * min and q * max of the page's keys;
    the token_budget / page_size pages with the largest bounds are read, at least three, by each query head for itself.
    The prompt, a question that follows it, and the first dense_layers layers are read whole. Memory is the full
    cache's. What is saved is reading: kv_bytes_read counts what a kernel would load for the last token, pairs once for
    the query heads of a group, and the bounds; here nothing is faster, since all keys are there and masked.

    Paper: arXiv:2406.10774. Reference: mit-han-lab/Quest, evaluation/quest_attention.py.
    Deviations: where the text is shorter than token_budget all of it is read (the reference rounds the number of its
    pages down). Of equal bounds the older page is read. In streamed documents every token chooses.
    """

    paper = "arXiv:2406.10774"
    compresses = False

    token_budget: int = setting(1024, "tokens that each query head reads, in whole pages, at least three")
    page_size: int = setting(16, "tokens of a page")
    dense_layers: int = setting(2, "first layers that are read whole")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"token_budget": slots}

    def validate(self) -> None:
        for name, least in (("token_budget", 1), ("page_size", 1), ("dense_layers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def pages(self) -> Pages:
        return Pages(self.page_size, max(LEAST, self.token_budget // self.page_size), self.dense_layers)
