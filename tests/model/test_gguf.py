"""`pretrained=FOLDER,gguf_file=model.gguf`: weights in llama.cpp's file format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from lm_eval import simple_evaluate

from kv_lm_eval import plugin, tiny

gguf = pytest.importorskip("gguf")
TASK = """
task: gguf_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["1", "2"]
doc_to_target: 0
"""


def write_gguf(model: tf.LlamaForCausalLM, tokenizer: tf.PreTrainedTokenizerFast, file: Path) -> None:
    """A Llama without biases and its byte-pair tokenizer, float32, as llama.cpp's converter names things."""
    config = model.config
    out = gguf.GGUFWriter(str(file), "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_vocab_size(config.vocab_size)
    words = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    model_json = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list([w if w is not None else f"<unused{i}>" for i, w in enumerate(words)])
    out.add_token_types([1] * config.vocab_size)
    out.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in model_json["merges"]])
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        value = tensor.float()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            rest, _, what = rest.rpartition(".")
            kind = names[rest]
            if kind in heads:  # llama.cpp interleaves the two halves of each rotation
                n = heads[kind]
                value = value.view(n, 2, value.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
            name = f"blk.{layer}.{kind}.{what}"
        else:
            outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            name = outer.get(name, "output.weight")
        out.add_tensor(name, value.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_gguf_file_gives_the_numbers_of_the_folder_that_it_was_made_of(tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.resolve("kv-tiny"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    folder, source = tmp_path / "gguf", tmp_path / "folder"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    folder.mkdir()
    write_gguf(model, tokenizer, folder / "model.gguf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "The number is {n}. The number is"}}\n' for n in range(1, 5)))
    (tmp_path / "gguf_choice.yaml").write_text(TASK.format(rows=rows))
    plugin.install()
    from lm_eval.tasks import TaskManager

    answers = []
    for where in (f"pretrained={folder},gguf_file=model.gguf,tokenizer={source}", f"pretrained={source}"):
        with plugin.only_our_tasks():
            found = simple_evaluate(
                model="kvcompressed",
                model_args=f"{where},method=snapkv,max_capacity_prompt=8,window_size=4,dtype=float32",
                tasks=["gguf_choice"],
                task_manager=TaskManager(include_path=str(tmp_path)),
                bootstrap_iters=0,
            )
        answers.append([[float(r[0][0]) for r in s["resps"]] for s in found["samples"]["gguf_choice"]])
    for a, b in zip(*answers, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
