"""Whatever can change an answer changes the identity; what cannot is listed with its reason."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from kv_lm_eval import config, contents, identity, tiny
from kv_lm_eval.model import KVCompressedLM

pytestmark = pytest.mark.filterwarnings("ignore")

FULL = {"pretrained": "kv-tiny", "method": "full"}
SNAPKV = {"pretrained": "kv-tiny", "method": "snapkv", "max_capacity_prompt": 24, "window_size": 8}


def early(**model_args: Any) -> str:
    return identity.digest(identity.before_loading({**FULL, **model_args}))


def late(**arguments: Any) -> str:
    return KVCompressedLM(**{**FULL, "device": "cpu", **arguments}).fingerprint()


# ---------------------------------------------------------------------------------------------------- arguments


HF = {p.name: p.default for p in inspect.signature(HFLM.__init__).parameters.values() if p.default is not p.empty}


@pytest.mark.parametrize("name", sorted({*HF, *config.FROM_PRETRAINED_KEYS}))
def test_every_argument_of_lm_evals_model_is_in_the_identity_or_is_listed_with_a_reason(name: str) -> None:
    given = HF.get(name)
    other = not given if isinstance(given, bool) else given + 1 if isinstance(given, int) else "something else"
    assert (early(**{name: other}) == early()) is (name in identity.WITHOUT_EFFECT)
    assert early(**{name: given}) == early() or name not in HF, "a default that is written out is no difference"


def test_what_has_no_effect_has_a_reason_and_is_an_argument() -> None:
    assert all(len(reason) > 10 for reason in identity.WITHOUT_EFFECT.values())
    assert set(identity.WITHOUT_EFFECT) <= {*HF, *config.FROM_PRETRAINED_KEYS}


def test_an_argument_that_a_later_lm_eval_adds_is_in_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    original = HFLM.__init__

    def later(self: Any, *args: Any, rope_theta_scale: float = 1.0, **kwargs: Any) -> None:
        original(self, *args, **kwargs)

    signature = inspect.signature(original)
    added = inspect.Parameter("rope_theta_scale", inspect.Parameter.KEYWORD_ONLY, default=1.0)
    *others, rest = signature.parameters.values()
    later.__signature__ = signature.replace(parameters=[*others, added, rest])  # type: ignore[attr-defined]
    before = early()
    monkeypatch.setattr(HFLM, "__init__", later)
    assert early() == early(rope_theta_scale=1.0) != early(rope_theta_scale=2.0)
    assert before != early()  # and is a new version's


@pytest.mark.parametrize("model", ["kvcompressed", "hf", "vllm"])
def test_arguments_of_other_models_are_in_too(model: str) -> None:
    def of(**more: Any) -> str:
        return identity.digest(identity.before_loading({"pretrained": "kv-tiny", **more}, model))

    assert len({of(), of(dtype="float32"), of(unheard_of=1), of(unheard_of=2)}) == 4


OURS: dict[str, Any] = {
    "tail_tokens": 2,
    "rolling_compress_every": 32,
    "overlong": "truncate_left",
    "question_in_prompt": False,
    "question_field": "query",
    "prefill_chunk": 16,
    "prefill_evict": 16,
    "compile": True,
    "fidelity": True,
}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(config.EngineSettings)])
def test_every_setting_of_the_engine_is_in(name: str) -> None:
    method = {"method": "streaming_llm", "window_size": 16}
    needs = {"question_in_prompt": False} if name == "question_field" else {}
    without, given = early(**method, **needs), early(**method, **needs, **{name: OURS[name]})
    assert without != given


def test_every_setting_of_a_method_is_in_whatever_it_is_called() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"max_capacity_prompt": 25},
        {"window_size": 9},
        {"kernel_size": 5},
        {"pooling": "avg"},
        {"compress_every": 4},
        {"layer_budget": "pyramid"},
        {"head_budget": "ada"},
        {"evicted": "compensate"},
        {"nbits": 4},
        {"tail_tokens": 3},
    ]
    assert len({early(**{**SNAPKV, **v}) for v in variants}) == len(variants)
    renamed = {"pretrained": "kv-tiny", "method": "snapkv", "budget": 24.0, "compression": '{"window_sizes": 8}'}
    assert identity.before_loading(renamed) == identity.before_loading(SNAPKV)


def test_values_that_differ_are_told_apart_and_equal_ones_are_not() -> None:
    linear = torch.nn.Linear(2, 2)
    values: list[Callable[[], Any]] = [
        *(
            lambda v=v: v
            for v in (None, True, False, 1, 2, 1.5, "1", "", "None", [], [1], [[1]], {}, {"a": 1}, {1: "a"})
        ),
        *(lambda v=v: v for v in ({1}, {1, 2}, b"", b"a", torch.float32, torch.bfloat16, {"a": [1, 2]}, {"a": [2, 1]})),
        lambda: torch.zeros(2),
        lambda: torch.zeros(3),
        lambda: torch.zeros(2, dtype=torch.float64),
        lambda: torch.zeros(2, 1),
        lambda: torch.tensor([0.0, -0.0]),
        lambda: copy.deepcopy(linear),
        lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        lambda: transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0),
        lambda: tokenizers.AddedToken("<a>"),
        lambda: tokenizers.AddedToken("<a>", lstrip=True),
    ]
    described = [json.dumps(identity.describe(value())) for value in values]
    assert described == [json.dumps(identity.describe(value())) for value in values]
    assert len(set(described)) == len(values)


def test_what_cannot_be_read_is_equal_to_nothing() -> None:
    def generator() -> Any:
        yield

    for value in (generator(), torch.zeros(2, device="meta"), object(), iter([])):
        assert identity.describe(value) != identity.describe(value)


# ---------------------------------------------------------------------------------------------------- files


def edit(file: Path) -> None:
    """Another content of the same length, at the same times."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    *("pytorch_model.bin", "model-q8.gguf", "pytorch_model.bin.index.json", "shards/part-1.safetensors"),
    *("model.safetensors.index.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("modeling_own.py", "tokenizer.model", "adapter_model.safetensors", "adapter_config.json", "added_tokens.json"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a model"
    shutil.copytree(tiny.path(), folder)
    for name in FILES:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_text('{"weight_map": {"a": "shards/part-1.safetensors"}}' if "index" in name else "x" * 50)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_model_folder_is_known_by_its_contents(name: str, folder: Path) -> None:
    before = early(pretrained=str(folder))
    edit(folder / name)
    assert early(pretrained=str(folder)) != before
    edit(folder / name)  # back again
    assert early(pretrained=str(folder)) == before
    os.utime(folder / name, ns=(0, 0))
    assert early(pretrained=str(folder)) == before, "a touch is no change"


@pytest.mark.parametrize("argument", ["tokenizer", "peft", "delta", "gguf_file", "some_file_of_a_later_version"])
def test_every_argument_that_names_files_brings_their_contents(argument: str, folder: Path) -> None:
    for named in (folder, folder / "model-q8.gguf"):
        before = early(**{argument: str(named)})
        edit(folder / "model-q8.gguf")
        assert early(**{argument: str(named)}) != before


def test_a_large_file_is_read_once_and_again_when_it_was_changed(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(bytes(2 * contents.LARGE_BYTES))
    now = contents.time.time_ns()
    monkeypatch.setattr(contents.time, "time_ns", lambda: now + 10**10)  # it has been lying there
    first = contents.file_digest(file)
    reads: list[Path] = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (reads.append(self), original(self, *a, **k))[1])
    assert contents.file_digest(file) == first and not reads
    contents.time.sleep(0.02)
    edit(file)
    assert contents.file_digest(file) != first


def test_results_and_checkpoints_below_a_model_do_not_count(folder: Path) -> None:
    before = early(pretrained=str(folder))
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_text("x")
    assert early(pretrained=str(folder)) == before


def hub_cache(root: Path, commit: str = "a" * 40) -> Path:
    """kv-tiny as the hub's cache holds a model."""
    repo = root / "models--owner--model"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "blobs").mkdir(exist_ok=True)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    for file in Path(tiny.path()).iterdir():
        blob = repo / "blobs" / contents.file_digest(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_a_name_of_the_hub_is_known_by_its_commit_and_by_what_was_edited_here(tmp_path: Path) -> None:
    def of() -> str:
        return early(pretrained="owner/model", cache_dir=str(tmp_path))

    nothing, snapshot = of(), hub_cache(tmp_path)
    first = of()
    assert first != nothing
    weights = snapshot / "model.safetensors"
    weights.unlink()
    assert of() == first, "the commit says what is not downloaded yet"
    weights.write_bytes((Path(tiny.path()) / "model.safetensors").read_bytes()[::-1])
    edited = of()
    assert edited != first
    hub_cache(tmp_path, "b" * 40)
    assert of() not in (first, edited, nothing)


OWN_METHOD = """
from kv_lm_eval.methods.base import Method, View
import {helper}

class Newest(Method):
    name = "newest"

    def score(self, view):
        return {helper}.SIGN * view.positions.float()
"""


def test_a_method_file_and_what_it_imports_beside_it_are_known_by_their_contents(
    tmp_path: Path, monkeypatch: Any
) -> None:
    helper = f"helper_of_{tmp_path.name}"
    monkeypatch.syspath_prepend(str(tmp_path))
    own, beside = tmp_path / "own.py", tmp_path / f"{helper}.py"
    own.write_text(OWN_METHOD.format(helper=helper))
    beside.write_text("SIGN = 1\n")
    settings = {"method": f"{own}:Newest", "max_capacity_prompt": 16}
    seen = [early(**settings)]
    for file in (beside, own):
        file.write_text(file.read_text() + "# another\n")
        seen.append(early(**settings))
    assert len(set(seen)) == 3
    assert early(**settings) == seen[-1]
    wrong = early(**settings, nonsense=1)  # told elsewhere, and still known by its file
    own.write_text(own.read_text() + "#\n")
    assert early(**settings, nonsense=1) != wrong
    sys.modules.pop(helper, None)


def test_a_settings_file_counts_by_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    seen = []
    for window in (8, 9):
        file.write_text(f"method: snapkv\nmax_capacity_prompt: 24\nwindow_size: {window}\n")
        seen.append(identity.digest(identity.before_loading({"pretrained": "kv-tiny", "compression": str(file)})))
    assert seen[0] == identity.digest(identity.before_loading(SNAPKV)) != seen[1]


def test_the_code_that_computes_is_known_by_its_contents() -> None:
    package = Path(identity.__file__).parent
    named = {name for name, _ in contents.files_of([package / part for part in identity.COMPUTES], only=".py")}
    for part in ("cache/attention.py", "engine/choices.py", "methods/snapkv.py", "requests/documents.py"):
        assert part in named
    assert not any("reporting" in name for name in named)


# ---------------------------------------------------------------------------------------------------- what was loaded


def loaded() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)


def words() -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny.path())


def test_before_and_after_loading_are_parts_of_one_identity() -> None:
    lm = KVCompressedLM(**SNAPKV, device="cpu", batch_size=2)
    after = identity.of_loaded(lm)
    assert {k: v for k, v in after.items() if k != "loaded"} == identity.before_loading({**SNAPKV, "batch_size": 5})


MODEL_CHANGES: dict[str, Callable[[Any], Any]] = {
    "one weight": lambda m: m.model.layers[1].mlp.up_proj.weight.data[3, 4].add_(1e-6),
    "two weights swapped": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.roll(1, 0)),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a configured number": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
    "generation defaults": lambda m: setattr(m.generation_config, "repetition_penalty", 1.3),
    "eos": lambda m: setattr(m.generation_config, "eos_token_id", [5]),
    "attention": lambda m: m.set_attn_implementation("eager"),
    "dtype": lambda m: m.to(torch.bfloat16),
    "a number in a layer": lambda m: setattr(m.model.norm, "variance_epsilon", 1e-2),
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_a_model_object_is_known_by_all_that_it_holds(change: str) -> None:
    def of(model: Any) -> str:
        return late(pretrained=model, tokenizer=tiny.path())

    model = loaded()
    before = of(model)
    assert of(model) == before == of(loaded())
    MODEL_CHANGES[change](model)
    assert of(model) != before


def _normalised(t: Any) -> None:
    t.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()


TOKENIZER_CHANGES: dict[str, Callable[[Any], Any]] = {
    "a token": lambda t: t.add_tokens(["zyzzyva"]),
    "a special token": lambda t: t.add_special_tokens({"additional_special_tokens": ["the"]}),
    "another eos": lambda t: setattr(t, "eos_token", "the"),
    "bos": lambda t: setattr(t, "bos_token", "the"),
    "normalizer": _normalised,
    "template": lambda t: setattr(t, "chat_template", "{{ messages }}"),
    "length": lambda t: setattr(t, "model_max_length", 99),
    "truncation side": lambda t: setattr(t, "truncation_side", "left"),
    "spaces": lambda t: setattr(t, "clean_up_tokenization_spaces", not t.clean_up_tokenization_spaces),
}


@pytest.mark.parametrize("change", TOKENIZER_CHANGES)
def test_a_tokenizer_object_is_known_by_all_that_it_holds(change: str) -> None:
    tokenizer = words()
    before = late(tokenizer=tokenizer)
    tokenizer(["two texts", "of different lengths"], padding=True, truncation=True, max_length=4)
    assert late(tokenizer=tokenizer) == before == late(tokenizer=words()), "a call is no change"
    TOKENIZER_CHANGES[change](tokenizer)
    assert late(tokenizer=tokenizer) != before


def test_adapters_are_known_by_their_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def save(seed: int, alpha: int = 8) -> None:
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(loaded(), settings).save_pretrained(str(tmp_path))

    seen = [late()]
    for seed, alpha in ((0, 8), (1, 8), (1, 9)):
        save(seed, alpha)
        seen.append(late(peft=str(tmp_path)))
    assert len(set(seen)) == 4
    assert late(peft=str(tmp_path)) == seen[-1]


def test_an_adapter_object_is_known_by_what_it_is_set_to() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(loaded(), lora)
    model.add_adapter("other", lora)
    seen = [late(pretrained=model, tokenizer=tiny.path())]
    for change in (
        lambda: model.set_adapter("other"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(2.0),
    ):
        change()
        seen.append(late(pretrained=model, tokenizer=tiny.path()))
    assert len(set(seen)) == len(seen) and late(pretrained=model, tokenizer=tiny.path()) == seen[-1]


def test_loading_differences_that_only_the_model_shows() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"mixed_precision_dtype": "bfloat16"},
        {"softmax_dtype": "float64"},
        {"max_length": 300},
        {"add_bos_token": True},
        {"prefix_token_id": 5},
        {"truncation": True},
        {"think_end_token": "</think>"},
        {"model_kwargs": {"num_hidden_layers": 1}},
        {"model_kwargs": {"rms_norm_eps": 1e-3}},
        {"attn_implementation": "eager"},
        {"chat_template_args": {"a": 1}},
    ]
    assert len({late(**change) for change in changes}) == len(changes)
    assert late(batch_size=7) == late()
