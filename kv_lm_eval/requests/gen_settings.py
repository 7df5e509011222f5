"""A request's generation settings, by lm-eval's own reading of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import GenerationConfig, PreTrainedModel

from kv_lm_eval.engine.generate import check_generation_settings
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.requests.run import Run

# Settings of generate() that look at a row's next scores and at its new tokens only. Any other may look at its prompt,
# and so at the padding before it. A repeated token of the prompt is penalised once, and padding repeats one.
ROW_BY_ROW = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "min_new_tokens", "max_new_tokens", "eos_token_id", "bos_token_id", "pad_token_id"),
    *("num_beams", "num_return_sequences", "use_cache", "cache_implementation", "length_penalty", "early_stopping"),
    *("max_length", "transformers_version", "_from_model_config"),
}
OURS = (
    *("use_cache", "past_key_values", "stopping_criteria", "input_ids", "attention_mask", "return_dict_in_generate"),
)


@dataclass(frozen=True)
class GenSettings:
    """What an answer may be.

    Attributes:
        key: equal for requests that may share a batch.
        until: stop strings. end_tokens: tokens that end an answer.
        max_new_tokens: of the answer. max_length: of prompt and answer together, where that was asked for.
        of_generate: settings of generate() as they are.
        beams: of the search, 1 for none.
        looks_at_prompt: whether rows share a batch only with prompts of their length.
    """

    key: str
    until: tuple[str, ...]
    end_tokens: tuple[int, ...]
    max_new_tokens: int
    max_length: int | None = None
    of_generate: dict[str, Any] = field(default_factory=dict)
    beams: int = 1
    looks_at_prompt: bool = False

    @property
    def of_each_row(self) -> bool:
        """Whether an answer is the same whatever is drawn or searched for other rows beside it."""
        return self.beams == 1 and not self.of_generate.get("do_sample")

    @classmethod
    def read(cls, run: Run, i: int) -> GenSettings:
        """The settings of a request.

        Raises:
            UserError: a value that cannot be, or a setting that does not go with a cache under test.
        """
        lm, given = run.lm, run.requests[i].args[1]
        where = f"in the generation settings of {run.called(i)}"
        if not isinstance(given, dict):
            raise UserError(f"{given!r} {where}: they must be names with values, such as {{'until': ['\\n']}}")
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, lm.max_gen_toks))
            max_length = None if kwargs.get("max_length") is None else int(kwargs["max_length"])
            counts = {name: int(_effective(run, kwargs, name) or 1) for name in ("num_beams", "num_return_sequences")}
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{given} {where}: {error}") from error
        kwargs.pop("max_length", None)
        most = int(kwargs.pop("max_gen_toks"))
        as_token_only = run.doc(i).get("eos_text_is_no_stop", False)
        no_text = as_token_only or lm.eot_token_id is None
        until = handle_stop_sequences(
            _stops(kwargs.pop("until"), where),
            None if no_text else lm.tok_decode(lm.eot_token_id, skip_special_tokens=False),
        )
        if most < 1:
            raise UserError(f"max_gen_toks={most} {where}: an answer needs at least 1 token")
        if most >= lm.max_length:
            raise UserError(
                f"max_gen_toks={most} {where} leaves no room for a prompt: the model's maximum is {lm.max_length} "
                "tokens for both. Set max_length=... if the model can take more, or generate fewer"
            )
        if max_length is not None and not 0 < max_length <= lm.max_length:
            raise UserError(
                f"max_length={max_length} {where} counts prompt and answer, and the model takes 1 to {lm.max_length} "
                "tokens for both. Use max_gen_toks, or set max_length=... in --model_args if the model can take more"
            )
        if counts["num_return_sequences"] > 1:
            raise UserError(
                f"num_return_sequences={counts['num_return_sequences']} {where}: lm-eval takes one answer a request. "
                "For several answers use the task's repeats"
            )
        _check(run, kwargs, counts["num_beams"], where)
        if run.engine.fidelity and (kwargs.get("do_sample") or counts["num_beams"] > 1):
            what = "do_sample=True" if kwargs.get("do_sample") else f"num_beams={counts['num_beams']}"
            raise UserError(
                f"{what} {where} with fidelity=True: answers are compared with the full cache's greedy one, and chance "
                "or a search would make others of the same distribution; remove the setting, or leave fidelity out"
            )
        ends = _tokens(_effective(run, kwargs, "eos_token_id"))
        if as_token_only and "eos_token_id" not in kwargs:
            ends = list(dict.fromkeys([*ends, *_tokens(lm.eot_token_id)]))
            kwargs["eos_token_id"] = ends
        own = run.causal_lm.generation_config.to_diff_dict()
        changed = {name for name, value in {**own, **kwargs}.items() if value and name not in ROW_BY_ROW}
        return cls(
            key=repr((sorted(given.items(), key=lambda item: str(item[0])), as_token_only)),
            until=tuple(until),
            end_tokens=tuple(ends),
            max_new_tokens=most,
            max_length=max_length,
            of_generate=_greedy_or_sampled(kwargs, where),
            beams=counts["num_beams"],
            looks_at_prompt=max_length is not None or bool(changed),
        )


def _check(run: Run, kwargs: dict[str, Any], beams: int, where: str) -> None:
    """Refuses what generate() cannot do here."""
    for name in OURS:
        if name in kwargs:
            raise UserError(f"{name}={kwargs[name]!r} {where}: it is the method's to set; remove the setting")
    known = _known(run.causal_lm)
    if unknown := [str(name) for name in kwargs if name not in known]:
        raise UserError(f"{unknown[0]}={kwargs[unknown[0]]!r} {where}: no such setting{close_names(unknown[0], known)}")
    if run.compression.method.uses_cache:
        check_generation_settings(kwargs)
    if run.decoder is not None and beams > 1:
        raise UserError(
            f"num_beams={beams} with compile=True: beams move rows about, which the compiled step does not; leave one "
            "of them out"
        )


def _known(model: PreTrainedModel) -> set[str]:
    """Names that generate() of this model takes, or hands to its forward."""
    cls: Any = type(model)
    functions = (cls.generate, cls.prepare_inputs_for_generation, cls.forward)
    taken = {name for function in functions for name in inspect.signature(function).parameters}
    return {*vars(GenerationConfig()), *taken} - {"self", "args", "kwargs"}


def _greedy_or_sampled(kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """As lm-eval's hf model: no temperature where nothing is sampled."""
    temperature = float(kwargs.get("temperature") or 0.0)
    if not kwargs["do_sample"]:
        return {name: value for name, value in kwargs.items() if name != "temperature" or value}
    if temperature <= 0:
        raise UserError(
            f"do_sample=True with temperature={temperature:g} {where}: sampling needs a temperature above 0; set one, "
            "or leave do_sample out"
        )
    return kwargs


def _stops(given: list[Any], where: str) -> list[str]:
    """Stop strings as texts; lm-eval makes a list of what is none, so that a tuple comes as its only member."""
    flat = [s for one in given for s in (one if isinstance(one, (tuple, list)) else [one]) if s is not None]
    if wrong := [s for s in flat if not isinstance(s, (str, int, float))]:
        raise UserError(f"until={wrong[0]!r} {where}: a stop is a text; as something else it would never be met")
    return [str(s) for s in flat]


def _effective(run: Run, kwargs: dict[str, Any], name: str) -> Any:
    """A setting as generate() will have it: asked for, or the model's own."""
    return kwargs.get(name, getattr(run.causal_lm.generation_config, name, None))


def _tokens(ids: Any) -> list[int]:
    return [] if ids is None else [int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids])]
