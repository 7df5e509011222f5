"""On real weights: a model in half precision, as it is loaded where nothing is said, is served, its keys moved."""

from __future__ import annotations

import pytest
import real_models as real
import tiny
import torch
import transformers as tf

from kv_lm_eval.engine.check import wrap

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", real.NAMES)
def test_the_self_check_takes_rounding_for_rounding(name: str, dtype: torch.dtype) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(real.folder(name), dtype=dtype).eval()
    facts = wrap(model, tiny.compression(method="streaming_llm", window_size=8))
    assert set(facts.rope_kinds) == {"rope"}
