"""Rotary embeddings as matrices in float64, written from the definition: independent of the models' own functions."""

from __future__ import annotations

import torch
import transformers as tf


def rotation(config: tf.PretrainedConfig, position: float) -> torch.Tensor:
    """[D, D]: turns a vector at position 0 to `position`; what lies beyond the rotary part stays as it is."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    turning = int(size * rope.get("partial_rotary_factor", 1.0))
    out = torch.eye(size, dtype=torch.float64)
    for i in range(turning // 2):
        angle = torch.tensor(position * rope["rope_theta"] ** (-2 * i / turning), dtype=torch.float64)
        j = i + turning // 2
        out[i, i] = out[j, j] = angle.cos()
        out[i, j], out[j, i] = -angle.sin(), angle.sin()
    return out


@torch.inference_mode()
def unrotated_queries(model: tf.PreTrainedModel, row: list[int]) -> list[torch.Tensor]:
    """Queries before their rotary embedding, as the stock model's own modules give them: [H, n, D] for each layer."""
    found: list[torch.Tensor] = []
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads

    def note(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        heads = output[0].reshape(len(row), model.config.num_attention_heads, -1)
        found.append(heads[..., :size].transpose(0, 1).double())  # a fused projection: the query comes first

    handles = []
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            part = getattr(module, "q_norm", None) or getattr(module, "q_proj", None) or module.query_key_value
            handles.append(part.register_forward_hook(note))
    model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found
