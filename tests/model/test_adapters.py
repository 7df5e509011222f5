"""Adapters: those inside the layers serve every method, those that feed tokens of their own are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.registry import get_model
from model.test_requests import STORY, request

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError

peft = pytest.importorskip("peft")
plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")

CAUSAL = {"task_type": "CAUSAL_LM"}
IN_LAYERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **CAUSAL),
    "lora without task": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False, **CAUSAL
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False, **CAUSAL
    ),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **CAUSAL),
}
VIRTUAL: dict[str, Any] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=32, **CAUSAL),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL),
}
TEXT = STORY[:140]
KEEPS_ALL = {"method": "streaming_llm", "window_size": 500, "n_sink": 2}


def lm(config: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)
    model = peft.get_peft_model(model, config()).eval()
    for name, parameter in model.named_parameters():
        if "adaption" in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    of = "kvcompressed" if settings else "hf"
    return get_model(of)(pretrained=model, tokenizer=tiny.path(), device="cpu", batch_size=2, **settings)


def answers(of: Any) -> tuple[Any, ...]:
    generated = [request("generate_until", TEXT[:n], {"until": [], "max_gen_toks": 6}) for n in (140, 60)]
    scored = [request("loglikelihood", TEXT[:n], c) for n in (140, 50) for c in (" The boats", " 48213")]
    read = of.loglikelihood_rolling([request("loglikelihood_rolling", TEXT)])
    return of.generate_until(generated), [s for s, _ in of.loglikelihood(scored)], read


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_adapters_inside_the_layers_answer_as_under_lm_evals_own_model(kind: str) -> None:
    expected = answers(lm(IN_LAYERS[kind]))
    for settings in ({"method": "full"}, {"method": "no_cache"}, KEEPS_ALL):
        got = answers(lm(IN_LAYERS[kind], **settings))
        assert got[0] == expected[0]
        assert got[1] == pytest.approx(expected[1], abs=1e-4) and got[2] == pytest.approx(expected[2], abs=2e-3)


def test_generation_over_a_window_sees_only_the_window_under_an_adapter_too() -> None:
    """Everything before the window may be another text."""
    for kind in ("lora", "adaption prompt"):
        one = lm(IN_LAYERS[kind], method="window_recompute", window_size=8)
        asked = [
            request(
                "generate_until",
                f"{a} the boats lay still in the harbour of the town",
                {"until": [], "max_gen_toks": 4},
            )
            for a in ("Zebras", "Nobody had said that")
        ]
        first, second = one.generate_until(asked)
        assert first == second


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("settings", [{"method": "full"}, KEEPS_ALL, {"method": "window_recompute", "window_size": 8}])
def test_virtual_tokens_are_refused_where_they_would_enter_again(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"adapter \((PROMPT|P|PREFIX)_TUNING\).*--model hf"):
        lm(VIRTUAL[kind], **settings)


def by_hand(stock: Any) -> list[str]:
    """The answers of `answers` by plain calls, a token at a time."""
    texts = []
    for n in (140, 60):
        row = stock.tok_encode(TEXT[:n])
        new: list[int] = []
        for _ in range(6):
            with torch.inference_mode():
                logits = stock.model(input_ids=torch.tensor([row + new], device=stock.device), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
        texts.append(stock.tok_decode(new))
    return texts


@pytest.mark.parametrize("kind", VIRTUAL)
def test_without_a_cache_virtual_tokens_are_those_of_lm_evals_own_model_or_refused(kind: str) -> None:
    try:
        got = answers(lm(VIRTUAL[kind], method="no_cache"))
    except UserError as error:
        assert kind == "prefix tuning" and "cannot generate without a cache" in str(error)
        return
    stock = lm(VIRTUAL[kind])
    expected = answers(stock)
    assert got[0] == by_hand(
        stock
    )  # some versions of peft and transformers do not generate with a cache as they should
    assert got[1] == pytest.approx(expected[1], abs=1e-4) and got[2] == pytest.approx(expected[2], abs=2e-3)
