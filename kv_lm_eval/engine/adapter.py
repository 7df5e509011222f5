"""What stands between lm-eval's call and the model itself: an adapter may change weights, but not what is fed.

Low-rank and scaling adapters live inside the layers, so that the model with them is a model like any other. Others put
virtual tokens before the input, again at every call: with a cache that is filled in several calls they would enter
several times. Which of the two an adapter is shows in what it hands on to the model below.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kv_lm_eval.engine.forward import cache_argument, device_of, forward_of
from kv_lm_eval.engine.lent import Call, each_forward
from kv_lm_eval.errors import UserError


@torch.inference_mode()
def check(called: Any, model: PreTrainedModel, needs_calls_as_made: bool, method: str) -> None:
    """Refuses an adapter under which the method's numbers would be wrong.

    Args:
        called: the object that requests go to. model: the transformers model below it, may be the same.
        needs_calls_as_made: whether the method feeds a cache, or a part of the context, itself.

    Raises:
        UserError: the adapter changes what is fed, which the method cannot have; or cannot generate without a cache.
    """
    if called is model:
        return
    ids = torch.arange(1, 7, device=device_of(model)).unsqueeze(0)
    changed = _changed(called, model, ids)
    if not changed:
        return
    kind = _name(called)
    if needs_calls_as_made:
        raise UserError(
            f"the adapter ({kind}) {changed}, at every call again, so that under method={method} its virtual tokens "
            "would enter several times or be cut off. Use method=no_cache or --model hf for it; adapters inside the "
            "layers (LoRA and its kin) work with every method."
        )
    try:
        why = _generates_otherwise(called, ids)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if why:
        raise UserError(
            f"the adapter ({kind}) {changed} and cannot generate without a cache, which method={method} asks for "
            f"({why}). Use --model hf for it."
        )


def _generates_otherwise(called: Any, ids: torch.Tensor) -> str:
    """Whether generate() without a cache says something else than plain calls do; empty if it does not."""
    count = 2
    out = called.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    row = torch.cat([ids, out.sequences[:, -count:]], dim=1)
    for i, logits in enumerate(out.logits):
        so_far = row[:, : ids.shape[1] + i]
        plain = called(input_ids=so_far, attention_mask=torch.ones_like(so_far), use_cache=False).logits[:, -1]
        error = (logits.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-9)
        if not error <= 5e-2:
            return f"its generate() differs from its own calls by {float(error):.1e}"
    return ""


def _changed(called: Any, model: PreTrainedModel, ids: torch.Tensor) -> str:
    """How a call with a cache reaches the layers otherwise than without the adapter; empty if it does not."""
    made: Call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1], device=ids.device).unsqueeze(0),
        "use_cache": True,
    }
    direct: list[Call] = []
    through: list[Call] = []
    for owner, seen in ((model, direct), (called, through)):
        cache = DynamicCache(config=model.config.get_text_config())

        def note(call: Call, into: list[Call] = seen, own: DynamicCache = cache) -> Call:
            into.append({name: "ours" if value is own else value for name, value in call.items()})
            return call

        try:
            with each_forward(model, note):
                owner(**made, **{cache_argument(forward_of(model)): cache})
        except Exception as error:
            return f"cannot be called with a cache ({type(error).__name__}: {str(error).splitlines()[0]})"
    if len(through) != len(direct):
        return f"calls the model {len(through)} times"
    other = [name for name, value in direct[0].items() if not _same(value, through[0].get(name))]
    return f"hands other {other[0]} on than it was given" if other else ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)


def _name(called: Any) -> str:
    config = getattr(called, "active_peft_config", None)
    return str(getattr(getattr(config, "peft_type", None), "value", None) or type(called).__name__)
