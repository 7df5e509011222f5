"""Protocols: what published LongBench numbers were made with, where it differs from the official code.

Sources: THUDM/LongBench@2e00731, FasterDecoding/SnapKV@e216ddc, KVCache-Factory before 7855979 (2026-07), which is
the code behind the tables of PyramidKV. dtype and attention kernel are the model's settings (--model_args).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_lm_eval.errors import UserError, close_names

# The official model2maxlen.json by the models' context length; other lengths leave what it leaves Llama-2.
OFFICIAL_MAX_LENGTH = {4096: 3500, 8192: 7500, 16384: 15500, 32768: 31500}
ROOM = 4096 - 3500


@dataclass(frozen=True)
class Protocol:
    """One way to run LongBench.

    Args:
        min_new_tokens: least tokens of every answer (stop_at_newline tasks have 1 in any case).
        newline_stops: whether tasks with `stop_at_newline` do.
        no_template_for: parts of model names that get no chat template; "" is every model.
        max_lengths: prompt tokens kept, by a part of the model's name; else by OFFICIAL_MAX_LENGTH.
        wraps: text put around the whole prompt before truncation, on all tasks, by a part of the model's name.
    """

    name: str
    min_new_tokens: int = 0
    newline_stops: bool = True
    no_template_for: tuple[str, ...] = ()
    max_lengths: dict[str, int] = field(default_factory=dict)
    wraps: dict[str, str] = field(default_factory=dict)

    def allows_template(self, model: str) -> bool:
        """Whether this model may get a chat template at all."""
        return not any(part in model.lower() for part in self.no_template_for)

    def max_length(self, model: str) -> int | None:
        """The protocol's own length for this model, if it has one."""
        return next((n for part, n in self.max_lengths.items() if part in model.lower()), None)

    def wrap(self, model: str) -> str | None:
        """The text around this model's prompts, with {prompt} in it."""
        return next((text for part, text in self.wraps.items() if part in model.lower()), None)


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("official"),
        Protocol(
            "snapkv",
            min_new_tokens=1,
            no_template_for=("mistral", "mixtral"),
            max_lengths={"mistral": 31500, "mixtral": 31500},
        ),
        Protocol(
            "kvcache_factory",
            min_new_tokens=1,
            newline_stops=False,
            no_template_for=("",),
            max_lengths={"llama2": 3950, "llama-2": 3950, "llama3": 7500, "llama-3": 7500, "mistral": 31500},
            wraps={"llama2": "[INST] {prompt} [/INST]", "llama-2": "[INST] {prompt} [/INST]"},
        ),
    )
}


def load(name: str) -> Protocol:
    """Returns the protocol of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol={name} is not one of: {', '.join(PROTOCOLS)}{close_names(name, PROTOCOLS)}")
    return PROTOCOLS[name]
