"""One context, many questions: `prefill` reads and compresses it once, `Context.ask` goes on from copies of it.

context = prefill(model, text, tokenizer=tokenizer, method="snapkv", max_capacity_prompt=512)
context.ask("What is the number?", max_new_tokens=20)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import torch

from kv_lm_eval.engine.lent import our_attention
from kv_lm_eval.engine.question import Contexts, Tails, as_fed, prefill_before_question
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.report import Report
from kv_lm_eval.serving.served import Served, in_use, model_of

Ids = Sequence[int] | torch.Tensor
PLACE = "\u2063context and question\u2063"  # where they go in a chat template


class Context:
    """What is left of a context after its compression; `prefill` makes it.

    Attributes:
        ids: the whole context's tokens.
    """

    def __init__(self, served: Served, ids: list[int], tokenizer: Any, end: str) -> None:
        self.ids, self._served, self._tokenizer, self._end = ids, served, tokenizer, end
        self._contexts = Contexts([ids], lasting=True)
        with our_attention(served.model), torch.no_grad():
            self._held = served.report_of(self._contexts.forks(served.model, [served.new_cache], [ids])[0])

    def report(self) -> Report:
        """What the context holds, before any question."""
        return self._held

    @property
    def answers(self) -> Report:
        """What the answers so far held and took, context included."""
        return self._served.report()

    @overload
    def ask(self, question: str, **settings: Any) -> str: ...
    @overload
    def ask(self, question: list[str], **settings: Any) -> list[str]: ...
    @overload
    def ask(self, question: Ids, **settings: Any) -> list[int]: ...
    def ask(self, question: str | list[str] | Ids, **settings: Any) -> str | list[str] | list[int]:
        """The answer to a question, or to each of a list of them in one batch; no question sees another.

        Args:
            question: text, a list of texts, or token ids. settings: of generate(), such as max_new_tokens=50.

        Returns:
            the new text without special tokens, a list of texts, or the new token ids, as the question was given.

        Raises:
            UserError: an empty question, a text without a tokenizer, or a setting that cannot be served.
        """
        texts = [question] if isinstance(question, str) else question
        if isinstance(texts, list) and texts and isinstance(texts[0], str):
            rows = [self._encode(str(text)) for text in texts]
            answers = self._answers(rows, settings)
            said = [str(self._tokenizer.decode(row, skip_special_tokens=True)) for row in answers]
            return said[0] if isinstance(question, str) else said
        return self._answers([_row(question)], settings)[0]

    def _encode(self, question: str) -> list[int]:
        if self._tokenizer is None:
            raise UserError("a question in words needs a tokenizer: prefill(model, ..., tokenizer=tokenizer)")
        return [int(i) for i in self._tokenizer(question + self._end, add_special_tokens=False)["input_ids"]]

    def _answers(self, questions: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
        """New tokens of each question, up to its end."""
        if not all(questions):
            raise UserError("an empty question: its last token is what the answer begins from; ask in a word or more")
        if copies := {"num_return_sequences", "num_beams", "return_dict_in_generate"} & set(settings):
            raise UserError(f"{copies.pop()}: ask() gives one answer a question, by greedy search or sampling")
        served, rows, tails = self._served, [self.ids + q for q in questions], [len(q) for q in questions]
        pad = _first(settings.get("pad_token_id"), served.model.generation_config.pad_token_id, 0)
        ids, mask = (t.to(served.model.device) for t in as_fed(rows, tails, pad))
        ids = torch.where(mask.bool(), ids, ids.new_tensor([row[0] for row in rows])[:, None])
        held = Tails(tails, self._contexts)
        begin = partial(prefill_before_question, served.model, served.new_cache, rows, held)
        call = {"pad_token_id": pad, **settings, "input_ids": ids, "attention_mask": mask}
        with in_use(served.model, "Context.ask()"):
            out = served.answer(served.called.generate, call, begin)
        ends = _first(settings.get("eos_token_id"), served.model.generation_config.eos_token_id, [])
        return [_until(row, {ends} if isinstance(ends, int) else set(ends)) for row in out[:, ids.shape[1] :].tolist()]


def prefill(
    model: Any,
    context: str | Ids,
    method: str | None = None,
    *,
    tokenizer: Any = None,
    chat: bool = False,
    **settings: Any,
) -> Context:
    """Reads a context once, compresses it without having seen a question, and holds what is left for all of them.

    The model is as it was when this returns, and after each answer.

    Args:
        model, method, **settings: as of `compress`.
        context: text, which needs `tokenizer`, or token ids. It and each question are tokenised apart.
        chat: whether context and question are one turn of the user's in the tokenizer's chat template.

    Raises:
        UserError: as of `compress`; an empty context.
    """
    below, end = model_of(model, "prefill()"), ""
    if isinstance(context, str):
        if tokenizer is None:
            raise UserError("a context in words needs a tokenizer: prefill(model, text, tokenizer=tokenizer, ...)")
        begin, end = _template(tokenizer) if chat else ("", "")
        ids = _row(tokenizer(begin + context, add_special_tokens=not chat)["input_ids"])
    elif chat:
        raise UserError("chat=True puts words into the chat template: give the context as text, or leave chat out")
    else:
        ids = _row(context)
    if not ids:
        raise UserError("the context is empty: there is nothing to hold; ask with model.generate()")
    with in_use(below, "prefill()"):
        served = Served(model, "prefill()", {"method": method, **settings}, question=True, tokenizer=tokenizer)
        served.check_words(tokenizer)
        if served.facts is None:
            raise UserError(f"prefill(): method={served.compression.method.name} has no cache that could be held")
        return Context(served, ids, tokenizer, end)


def _template(tokenizer: Any) -> tuple[str, str]:
    """What a chat template puts before and after a turn of the user's."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("chat=True: the tokenizer has no chat template, as of a base model; leave chat out")
    turn = [{"role": "user", "content": PLACE}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, _, after = text.partition(PLACE)
    return before, after


def _row(ids: Any) -> list[int]:
    """Token ids [n] or [1, n] as a list."""
    values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if any(not isinstance(i, int) for i in values):
        raise UserError("token ids are whole numbers, of one context or one question: [n] or [1, n]")
    return values


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _until(row: list[int], ends: set[int]) -> list[int]:
    """Tokens up to the first end, which is left out."""
    return row[: next((n for n, token in enumerate(row) if token in ends), len(row))]
