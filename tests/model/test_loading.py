"""A model that cannot be loaded, or would answer without a word, ends in one line before any work."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from model.test_identity import hub_cache
from model.test_requests import STORY, answers, load, request

from kv_lm_eval import loading, tiny
from kv_lm_eval.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def weights(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        model = model_of(folder)
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder)

    return damage


def cut(name: str, bytes_left: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:bytes_left])


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def without(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


def one_shard_missing(folder: Path) -> None:
    model_of(folder).save_pretrained(folder, max_shard_size="1MB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def other_shapes(folder: Path) -> None:
    configure(folder, intermediate_size=64)


WEIGHTS = "model.safetensors"
NOT_A_NUMBER = weights(lambda m: m.model.layers[1].mlp.down_proj.weight.__setitem__((0, 0), float("nan")))
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut off": (cut(WEIGHTS, 200_000), r"model\.safetensors is no whole .*200,000 bytes"),
    "header cut off": (cut(WEIGHTS, 20), r"model\.safetensors is no whole .*header is cut off"),
    "weights empty": (cut(WEIGHTS, 0), r"model\.safetensors is no whole .*it is empty"),
    "weights garbage": (written(WEIGHTS, os.urandom(5000)), r"model\.safetensors is no whole"),
    "header garbage": (written(WEIGHTS, (8).to_bytes(8, "little") + b"\xff" * 100), r"model\.safetensors is no whole"),
    "header a list": (written(WEIGHTS, (8).to_bytes(8, "little") + b"[1,2,3]  "), r"model\.safetensors is no whole"),
    "no weights": (without(WEIGHTS), "no file named model.safetensors"),
    "a pickle that is none": (
        lambda f: (without(WEIGHTS)(f), written("pytorch_model.bin", b"abc")(f)),
        "could not be loaded",
    ),
    "a shard missing": (one_shard_missing, "names 1 files that are not there, such as model-00002"),
    "a layer missing": (lambda f: configure(f, num_hidden_layers=5), "no weights for 13 of .*layers.4"),
    "other shapes": (other_shapes, "other shapes"),
    "NaN": (NOT_A_NUMBER, r"layers\.1\.mlp\.down_proj\.weight holds NaN"),
    "infinity": (weights(lambda m: m.model.norm.weight.fill_(float("inf"))), r"model\.norm\.weight holds NaN or inf"),
    "no config": (without("config.json"), "there is no config.json"),
    "config cut off": (cut("config.json", 50), r"config\.json: not whole JSON"),
    "config a list": (written("config.json", b"[]"), r"config\.json: .*dictionary"),
    "config binary": (written("config.json", bytes(range(128, 256))), r"config\.json, line 1: not UTF-8"),
    "config without a type": (written("config.json", b"{}"), "model_type"),
    "config of another age": (lambda f: configure(f, model_type="nosuch"), "nosuch"),
    "config impossible": (lambda f: configure(f, hidden_size=100), "hidden size"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "there are no tokenizer files in"),
    "half a tokenizer": (without("tokenizer.json"), "there are no tokenizer files in"),
    "tokenizer cut off": (cut("tokenizer.json", 3000), r"tokenizer\.json: not whole JSON"),
    "tokenizer empty": (cut("tokenizer.json", 0), r"tokenizer\.json: is empty"),
    "tokenizer config cut off": (cut("tokenizer_config.json", 9), r"tokenizer_config\.json: not whole"),
    "generation defaults cut off": (cut("generation_config.json", 9), r"generation_config\.json: not whole"),
    "a smaller vocabulary": (weights(lambda m: m.resize_token_embeddings(300)), "another model.*tokenizer=NAME"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_is_not_whole_is_told_in_one_line_that_names_what(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.path(), folder)
    apply, words = DAMAGE[damage]
    apply(folder)
    for method in ("full", "no_cache"):
        with pytest.raises(UserError, match=words) as caught:
            load("kvcompressed", pretrained=str(folder), method=method)
        assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for pretrained, words in (
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path), "no config.json"),
        (str(tmp_path / "nowhere"), "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            load("kvcompressed", pretrained=pretrained, method="full")


def test_tokens_that_were_added_to_the_tokenizer_alone_stop_the_prompt_that_holds_one(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    lm = load("kvcompressed", method="full", tokenizer=str(tmp_path))
    whole = load("kvcompressed", method="full")
    assert answers(lm) == answers(whole)
    settings = {"until": [], "max_gen_toks": 4}
    for kind, args in (
        ("generate_until", (f"{STORY} <extra>", settings)),
        ("loglikelihood", (STORY, " <extra>")),
        ("loglikelihood_rolling", (f"{STORY} <extra>",)),
    ):
        with pytest.raises(UserError, match=r"<extra>.*no embedding"):
            getattr(lm, kind)([request(kind, *args)])


def test_a_chat_template_that_the_tokenizer_has_not_is_told() -> None:
    with pytest.raises(UserError, match="has no chat template.*leave out --apply_chat_template"):
        load("kvcompressed", method="full").apply_chat_template([{"role": "user", "content": "hi"}])


def test_padding_without_an_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="padding token '<padding>'"):
        load("kvcompressed", method="full", tokenizer=str(tmp_path))


# ---------------------------------------------------------------------------------------------------- offloaded weights


ONLY_CUT = {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8}
STREAMING = {"method": "streaming_llm", "window_size": 28, "compress_every": 4}


@pytest.mark.parametrize(
    ("memory", "settings"),  # half of the layers, and everything
    [("3MiB", ONLY_CUT), ("1KiB", {"method": "full"}), ("1KiB", {"method": "no_cache"}), ("1KiB", STREAMING)],
    ids=str,
)
def test_weights_on_the_disk_give_the_answers_of_weights_in_memory(
    memory: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    place = {"parallelize": True, "max_cpu_memory": memory, "offload_folder": str(tmp_path)}
    lm = load("kvcompressed", **settings, **place)
    assert any(p.is_meta for p in lm.model.parameters())
    got, expected = answers(lm), answers(load("kvcompressed", **settings))
    assert got[0] == expected[0]
    assert [s for s, _ in got[1]] == pytest.approx([s for s, _ in expected[1]], abs=1e-4)
    assert got[2] == pytest.approx(expected[2], abs=1e-3)


# ---------------------------------------------------------------------------------------------------- without a network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a hub whose name nobody knows."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loading.hub_is_reachable.cache_clear()
    yield tmp_path
    loading.hub_is_reachable.cache_clear()


@pytest.mark.parametrize("arguments", [{"pretrained": "owner/model"}, {"tokenizer": "owner/model"}])
def test_without_a_network_nobody_waits_for_retries(arguments: dict[str, Any], no_network: Path) -> None:
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"owner/model: http://hub\.invalid cannot be reached"):
        load("kvcompressed", method="full", **arguments)
    assert time.perf_counter() - begin < 15, "one try for each file would take half a minute"


def test_without_a_network_the_copy_in_the_cache_is_taken_at_once(no_network: Path, monkeypatch: Any) -> None:
    hub_cache(no_network)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(no_network), raising=False)
    with loading.loading("owner/model", {}):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
