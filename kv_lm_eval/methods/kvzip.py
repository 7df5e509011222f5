from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, Reading, View, setting

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts, Words

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
BEFORE = 8  # tokens before a later part with which it is said to start


class KVzip(Method):
    """Pairs stay that the model looks at when it is asked to repeat the text, which serves any question.

    Before a cut the text is fed again, in parts of chunk_size tokens, each behind the words "Repeat the previous
    context exactly." A pair's score is the largest attention that any query of its group pays it there, where the
    queries see the first n_sink tokens, the part and their own repetition. What is fed so is thrown away. It costs one
    to two times the prefill once more; the cut waits for it, so that all layers are whole until then. In a streamed
    document, and with compress_every, each cut reads the tokens since the last one again, and older pairs keep their
    scores. plus=True is KVzip+: attention a_ij of token i to pair j counts as a_ij |W_o v_j| / |h_i|, with the query
    head's part of the output projection and the hidden state that i's query was made of.

    Paper: arXiv:2505.23416, section 3. Reference: snu-mllab/KVzip, model/wrapper.py and attention/score.py;
    NVIDIA/kvpress, kvzip_press.py.
    Deviations: parts of 2,048 tokens as in kvpress (the authors: 2,000). Where a prompt begins as the tokenizer's chat
    format does, what comes before the user's words is not repeated and scores 0, as in kvpress (the authors never
    evict it); other prompts are repeated from their first token on. The first n_sink tokens always stay. Softmax in
    float32, with the model's own scaling and softcap. The budget is met to the slot.
    layer_budget=uniform,head_budget=ada,alpha=0 is the layerwise form of kvpress.
    """

    paper = "arXiv:2505.23416"
    presets = {"layer_budget": "global"}
    reads_again = True

    chunk_size: int = setting(2048, "tokens that are repeated at a time")
    n_sink: int = setting(4, "first tokens that always stay, and that every repetition sees")

    plus: bool = setting(
        False, "KVzip+: attention counts times what the value adds to the hidden state, in parts of its length"
    )

    def validate(self) -> None:
        if self.chunk_size < 1:
            raise UserError(f"chunk_size={self.chunk_size} repeats nothing; it is a number of tokens, at least 1")
        if self.n_sink < 0:
            raise UserError(f"n_sink={self.n_sink} is negative; 0 means no sinks")

    @property
    def protected(self) -> int:
        return self.n_sink

    @property
    def reads_effects(self) -> bool:
        return self.plus

    @property
    def reread_sinks(self) -> int:
        return self.n_sink

    def check_model(self, facts: ModelFacts) -> None:
        if facts.border is not None:
            raise UserError(
                f"method={self.name} reads a prompt again behind itself, and beyond {facts.border} tokens this model "
                "rotates every token by the length of the whole: the repetition would see other keys than the answer; "
                "take a method that reads once, such as snapkv"
            )

    def warnings(self, facts: ModelFacts) -> list[str]:
        longest = facts.max_positions
        if longest is None:
            return []
        return [
            f"a prompt is read again behind itself, {self.chunk_size} tokens and a request at a time: with more than "
            f"{max(longest // 2, longest - self.chunk_size) - 64} tokens it goes beyond the {longest} positions of the "
            "model"
        ]

    def readings(self, text: Sequence[int], done: int, words: Words) -> list[Reading]:
        head = len(words.head)
        chat = 0 < head < len(text) and list(text[:head]) == list(words.head)
        begin = head if chat else 0
        tail = list(words.tail) if chat else words.encode("\n")
        found = []
        for first in range(max(done, begin), len(text), self.chunk_size):
            last = min(len(text), first + self.chunk_size)
            before = text[max(begin, first - min(BEFORE, self.chunk_size)) : first]
            said = [*words.encode(LATER), *before] if before else words.encode(FIRST)
            found.append(Reading(first, last, [*said, *tail, *text[first:last]]))
        return found

    def weights(self, view: View) -> Tensor:
        """[B, K, N]: the scores, but for the sinks'."""
        return view.reread

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the sinks always, then the strongest attention of a repetition."""
        return view.reread.masked_fill(view.first(self.n_sink), float("inf"))
