"""`compress` around a script's own generate(): the answers of the evaluation, stock's under full, a model as it was."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import tiny as models
import torch
import transformers as tf

from kv_lm_eval import UserError, compress, compressed_cache, prefill, tiny

SNAPKV = {"method": "snapkv", "max_capacity_prompt": 16, "window_size": 4}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "returned sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "hidden states": {"output_hidden_states": True},
    "an end": {"eos_token_id": list(range(40))},
}


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    return models.build("llama")


def inputs(*lengths: int) -> dict[str, torch.Tensor]:
    ids, mask, _ = models.left_padded([models.tokens(n, seed=n) for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


def state(model: torch.nn.Module) -> object:
    """What of a model's objects a block might leave behind."""
    own = [(id(m), sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return own, model.config._attn_implementation, model.generate.__func__


@pytest.mark.parametrize("way", WAYS)
def test_under_full_a_batch_of_any_lengths_is_answered_as_stock_does(model, way):
    said = []
    for around in (nullcontext(), compress(model, method="full")):
        torch.manual_seed(3)
        with around:
            said.append(model.generate(**inputs(40, 17), **{**GREEDY, **WAYS[way]}))
    assert said[0].tolist() == said[1].tolist()


def test_scores_hidden_states_and_streams_are_handed_out(model):
    class Heard(list):
        put = list.append

        def end(self):
            self.append("end")

    with compress(model, **SNAPKV):
        out = model.generate(**inputs(40), **GREEDY, return_dict_in_generate=True, output_scores=True)
        assert len(out.scores) == 6
        asked = {"return_dict_in_generate": True, "output_hidden_states": True}
        more = model.generate(**inputs(40), **GREEDY, **asked)
        assert len(more.hidden_states) == 6 and more.sequences.tolist() == out.sequences.tolist()
        heard = Heard()
        model.generate(inputs(40)["input_ids"], **GREEDY, streamer=heard)
    assert heard[0].shape == (1, 40) and [int(t) for t in heard[1:-1]] == out.sequences[0, 40:].tolist()
    assert heard[-1] == "end"


def test_stop_strings_are_looked_for(model):
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.path())
    wanted = model.generate(**inputs(20), **{**GREEDY, "max_new_tokens": 12}, stop_strings=["a"], tokenizer=tokenizer)
    with compress(model, method="full"):
        got = model.generate(**inputs(20), **{**GREEDY, "max_new_tokens": 12}, stop_strings=["a"], tokenizer=tokenizer)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("settings", [SNAPKV, {**SNAPKV, "prefill_chunk": 9}, {"method": "window", "window_size": 8}])
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_a_cache_by_hand(model, settings, beams):
    """The stock loop over make_cache()'s cache, one prompt at a time; chunks change nothing."""
    with compress(model, **settings) as compressed:
        got = model.generate(**inputs(40, 17, 30), **GREEDY, num_beams=beams)
    pair, wanted = models.pair("llama"), []
    for n in (40, 17, 30):
        cache = pair.cache(**{k: v for k, v in settings.items() if k != "prefill_chunk"})
        out = pair.model.generate(**inputs(n), **GREEDY, num_beams=beams, **models.given(cache))
        wanted.append(out[0, n:].tolist())
    assert got[:, 40:].tolist() == wanted
    report = compressed.report()
    assert report.answers == 3 * beams and report.prompt_tokens == beams * 87 and report.compressed


def test_the_report_counts_what_is_held():
    model = models.build("llama")
    with compress(model, **SNAPKV) as compressed:
        assert str(compressed.report()) == "snapkv: nothing was read yet"
        model.generate(**inputs(40, 17), **GREEDY)
        model.generate(**inputs(50), **GREEDY)
    report = compressed.report()
    pair = 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, head size, bytes
    assert (report.answers, report.prompt_tokens, report.new_tokens) == (3, 107, 18)
    assert report.kv_bytes == 3 * (16 + 5) * pair and report.kv_bytes_full == (107 + 15) * pair
    assert report.kept_fraction == pytest.approx((21 / 45 + 21 / 22 + 21 / 55) / 3)
    assert 0 < report.ttft_s < report.total_s and 0 < report.compression_s < report.total_s
    assert "3 answers (3 compressed), 107 + 18 tokens" in str(report)


def test_an_answer_that_ends_early_is_counted_with_its_own_tokens(model):
    with compress(model, **SNAPKV) as compressed:
        out = model.generate(**inputs(40, 17, 30), **{**GREEDY, "max_new_tokens": 12, "eos_token_id": [*range(24)]})
    own = [next((i + 1 for i, t in enumerate(row) if t < 24), 12) for row in out[:, 40:].tolist()]
    assert len(set(own)) > 1 and compressed.report().new_tokens == sum(own)


@pytest.mark.parametrize("method", ["no_cache", "window_recompute"])
def test_methods_without_a_cache_recompute(model, method):
    settings = {"n_sink": 0, "window_size": 40} if method == "window_recompute" else {}
    with compress(model, method=method, **settings) as compressed:
        got = model.generate(**inputs(30), **GREEDY)
    assert got.tolist() == model.generate(**inputs(30), **GREEDY).tolist()
    assert compressed.report().kv_bytes == 0 and compressed.report().new_tokens == 6


def test_a_method_that_asks_the_model_to_repeat_the_prompt_takes_a_tokenizer():
    model = tf.AutoModelForCausalLM.from_pretrained(tiny.path())
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.path())
    ids = tokenizer("The ferry was late. " * 9, return_tensors="pt")
    settings = {"method": "kvzip", "max_capacity_prompt": 24}
    with compress(model, **settings, tokenizer=tokenizer) as compressed:
        model.generate(**ids, max_new_tokens=3)
    assert compressed.report().compressed == 1
    with pytest.raises(UserError, match="tokenizer"), compress(model, **settings):
        model.generate(**ids, max_new_tokens=3)
    with pytest.raises(UserError, match="reads a prompt twice"), compressed_cache(model, **settings):
        pass


# ---------------------------------------------------------------------------------------------------- as it was


def test_the_model_is_as_it_was_also_after_errors(model):
    before, own = state(model), model.generate(**inputs(40), **GREEDY).tolist()
    with compress(model, **SNAPKV):
        model.generate(**inputs(40), **GREEDY)
    assert state(model) == before
    with pytest.raises(KeyError), compress(model, **SNAPKV):
        raise KeyError
    with pytest.raises(UserError), compress(model, **SNAPKV):
        model.generate(**inputs(40), **GREEDY, cache_implementation="static")
    with pytest.raises(UserError, match="needs one budget"), compress(model, method="snapkv"):
        pass
    with pytest.raises(KeyError), compressed_cache(model, **SNAPKV):
        raise KeyError
    prefill(model, models.tokens(40), **SNAPKV).ask(models.tokens(5), **GREEDY)
    assert state(model) == before and model.generate(**inputs(40), **GREEDY).tolist() == own


def test_a_model_in_use_is_refused_and_a_forward_of_ones_own_too(model):
    context = prefill(model, models.tokens(40), **SNAPKV)
    with compress(model, **SNAPKV):
        for other in (
            lambda: compress(model, method="full").__enter__(),
            lambda: compressed_cache(model, method="full").__enter__(),
            lambda: prefill(model, [1, 2, 3], method="full"),
            lambda: context.ask([1, 2]),
        ):
            with pytest.raises(UserError, match=r"in use by compress\(\)"):
                other()
        with pytest.raises(UserError, match="a forward of one's own"):
            model(**inputs(5))
    model(**inputs(5))


def test_another_thread_may_generate_but_not_two_and_the_block_waits_for_it(model):
    begun, go, said, refused = threading.Event(), threading.Event(), [], []

    class Slow:
        def put(self, value):
            begun.set()
            assert go.wait(20)

        def end(self):
            said.append("the answer's end")

    def answer():
        model.generate(**inputs(40), **GREEDY, streamer=Slow())

    before = state(model)
    thread = threading.Thread(target=answer)
    with compress(model, **SNAPKV):
        thread.start()
        assert begun.wait(20)
        with pytest.raises(UserError, match="second generate"):
            model.generate(**inputs(40), **GREEDY)
        threading.Timer(0.1, go.set).start()
    assert not refused and said, "the block is left when its last answer is there"
    thread.join(20)
    assert state(model) == before


REFUSED = {
    "cache_implementation": ("static", "cache_implementation=static"),
    "prefill_chunk_size": (8, "prefill_chunk_size"),
    "assistant_model": (object(), "assisted decoding"),
    "prompt_lookup_num_tokens": (3, "assisted decoding"),
    "past_key_values": (tf.DynamicCache(), "leave past_key_values out"),
    "use_cache": (False, "method=no_cache"),
    "custom_generate": ("x/y", "custom_generate"),
    "inputs_embeds": (torch.zeros(1, 3, 32), "give input_ids"),
    "position_ids": (torch.zeros(1, 40, dtype=torch.long), "leave position_ids out"),
    "output_attentions": (True, "output_attentions=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_compressed_cache_cannot_serve_is_refused_in_one_line(model, name):
    value, words = REFUSED[name]
    with compress(model, **SNAPKV), pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
        model.generate(**inputs(40), **GREEDY, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"compile": True}, {"fidelity": True}, {"tail_tokens": 3}, {"dtype": "float32"}])
def test_settings_without_effect_are_refused(model, settings):
    with pytest.raises(UserError, match=next(iter(settings))), compress(model, **SNAPKV, **settings):
        pass


@pytest.mark.parametrize("wrong", ["kv-tiny", torch.nn.Linear(2, 2), None])
def test_what_is_no_loaded_model_is_refused(wrong):
    with pytest.raises(UserError, match="takes a loaded transformers model"), compress(wrong, **SNAPKV):
        pass


def test_an_encoder_decoder_is_refused():
    config = tf.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="no causal language model"):
        compress(tf.T5ForConditionalGeneration(config), **SNAPKV).__enter__()


# ---------------------------------------------------------------------------------------------------- other roads


def test_the_cache_alone_serves_generate_and_loops_of_ones_own(model):
    with compress(model, **SNAPKV):
        wanted = model.generate(**inputs(40), **GREEDY)[0].tolist()
    with compressed_cache(model, **SNAPKV) as cache:
        assert "nothing was read yet" in str(cache.report())
        assert model.generate(**inputs(40), **GREEDY, past_key_values=cache)[0].tolist() == wanted
        assert cache.report().kv_bytes == 21 * 256 and cache.report().kv_bytes_full == 45 * 256
    with compressed_cache(model, **SNAPKV) as cache, torch.no_grad():
        ids = inputs(40)["input_ids"]
        for _ in range(6):
            new = ids if not cache.get_seq_length() else ids[:, -1:]
            ids = torch.cat([ids, model(new, past_key_values=cache).logits[:, -1:].argmax(-1)], dim=1)
        with pytest.raises(UserError, match="without one"):
            model(ids)
    assert ids[0].tolist() == wanted


def test_the_answers_are_those_of_the_evaluation():
    from kv_lm_eval.model import KVCompressedLM

    settings = {"method": "snapkv", "max_capacity_prompt": 48, "window_size": 8}
    text = "The pass code is 4817. " + "The river was calm and the ferry was late. " * 12 + "The pass code is"
    model = tf.AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.path(), padding_side="left")
    lm = KVCompressedLM(model, tokenizer=tokenizer, batch_size=2, **settings)
    from lm_eval.api.instance import Instance

    prompts, how = [text, text[23:]], {"until": [], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, how), i) for i, prompt in enumerate(prompts)]
    wanted = lm.generate_until(asked, disable_tqdm=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with compress(model, **settings) as compressed:
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    new = out[:, batch["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(new, skip_special_tokens=True) == wanted
    stats = lm.get_model_info()["kv_stats"]
    assert compressed.report().kept_fraction == pytest.approx(stats["kept_fraction_mean"])
    assert compressed.report().kv_bytes / 2 == pytest.approx(stats["kv_bytes_decode_mean"])
    pipe = tf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    with compress(model, **settings):
        said = pipe(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"] == wanted[0]


def test_an_adapter_is_served():
    peft = pytest.importorskip("peft")
    base = models.build("llama", seed=5)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    wanted = adapted.generate(**inputs(30, 20), **GREEDY).tolist()
    with compress(adapted, method="full"):
        assert adapted.generate(**inputs(30, 20), **GREEDY).tolist() == wanted
    assert "generate" not in adapted.__dict__
