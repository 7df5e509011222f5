"""`kv-lm-eval inspect`: what it says was kept was kept, its attention is the model's own, and the page shows both."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny as models
import torch

from kv_lm_eval import cli, tiny
from kv_lm_eval.analysis import inspect
from kv_lm_eval.analysis.kept import look
from kv_lm_eval.serving.served import Served

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
PROMPT = "The ferry is late. " * 8 + "The pass code is 4817. " + "Gulls cried over the water. " * 8 + "The pass code is"
SNAPKV = "method=snapkv,max_capacity_prompt=32,window_size=8"


def run(folder: Path, model_args: str = f"pretrained=kv-tiny,{SNAPKV}", text: str = PROMPT) -> int:
    (folder / "prompt.txt").write_text(text, encoding="utf-8")
    given = ["--model_args", model_args, "--output_path", str(folder / "out"), "--max_new_tokens", "5"]
    return cli.main(["inspect", "--prompt-file", str(folder / "prompt.txt"), *given])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    assert run(folder) == 0
    return folder / "out"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_attention_is_that_of_the_models_own_eager_attention(name):
    prompt, new = models.tokens(40), 4
    found = look(Served(models.build(name), "inspect", models.example("snapkv", 12)), prompt, new, 0)
    stock = models.build(name)
    stock.set_attn_implementation("eager")
    row = torch.tensor([prompt + found.full_answer[:-1]])
    attentions = stock(row, output_attentions=True).attentions
    for layer, (kept, share) in enumerate(zip(found.kept, found.shares, strict=True)):
        wanted = attentions[layer][0, :, 39:, :40].mean(1)  # [H, T] from the prompt's last token on
        assert torch.allclose(share, wanted.view(2, -1, 40).mean(1), atol=1e-5)
        mass = [float(w[k].sum() / w.sum()) for w, k in zip(share, kept, strict=True)]
        assert found.mass_kept()[layer] == pytest.approx(mass)
    full = stock.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    assert full[0, 40:].tolist() == found.full_answer


@pytest.mark.parametrize("method", models.methods(lambda cls: cls.uses_cache))
def test_what_is_kept_is_what_the_cache_holds_after_the_prompt(method):
    settings, prompt = models.example(method, 12), models.tokens(40)
    served, pair = Served(models.build("llama"), "inspect", settings), models.pair("llama")
    served.facts.words = pair.facts.words
    found = look(served, prompt, 2, 0)
    cache = pair.cache(**settings)
    models.forward(pair.model, cache, [prompt])
    if not cache.compression.method.hides:
        for layer in range(2):
            held = [set(torch.nonzero(row).flatten().tolist()) for row in found.kept[layer]]
            wanted = [set(head) for head in models.kept(cache, layer)]
            assert held == (wanted * len(held) if len(wanted) == 1 else wanted)
    assert all(0 < value <= 1 + 1e-6 for layer in found.mass_kept() for value in layer)
    if method == "full":
        assert all(kept.all() for kept in found.kept) and float(found.beside.kl.max()) < 1e-9


def test_the_numbers_and_the_summary(out, capsys):
    numbers = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    assert set(sum(numbers["kept_by_head"], [])) == {32}
    assert numbers["kept_share"] == pytest.approx(32 / numbers["prompt_tokens"])
    assert len(numbers["kl"]) == len(numbers["full_answer"]) and min(numbers["kl"]) >= 0
    assert f"attention mass kept            {numbers['mass_kept']:.1%}" in inspect.summary(numbers)


def test_the_page_stands_alone(out):
    text = (out / "inspect.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|@import|url\(|<link|src=", text)
    assert text.count("</script>") == 2


def test_the_pieces_of_a_prompt_are_the_prompt():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    for text in (PROMPT, "naïve café 🙂🙂 日本", "</script>\n\n x"):
        ids, pieces = inspect.tokens_of(tokenizer, text, False)
        assert len(ids) == len(pieces) and "".join(pieces).endswith(text)


@pytest.mark.parametrize(
    ("model_args", "text", "words"),
    [
        ("method=snapkv,max_capacity_prompt=8", PROMPT, "which model"),
        ("pretrained=kv-tiny,method=no_cache", PROMPT, "has no cache"),
        ("pretrained=kv-tiny,method=snapkv", PROMPT, "needs one budget"),
        ("pretrained=kv-tiny,method=full", " \n", "is empty"),
        ("pretrained=kv-tiny,method=full,trust_remote_code=True", PROMPT, "takes pretrained, dtype"),
        ("pretrained=kv-tiny,method=full", "word " * 9000, "tokens, and 5 new ones"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, model_args, text, words):
    assert run(tmp_path, model_args, text) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1] and not (tmp_path / "out" / "inspect.html").exists()


@pytest.mark.skipif(not BROWSER, reason="needs a Chromium")
def test_a_browser_shows_the_numbers_and_a_token(out, tmp_path):
    numbers = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    words = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [BROWSER, *words, "--dump-dom", f"{(out / 'inspect.html').as_uri()}#token=3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shown = dict(re.findall(r'<b id="(n-\w+)">([^<]*)</b>', done.stdout))
    assert shown["n-tokens"] == str(numbers["prompt_tokens"])
    assert shown["n-kept"] == f"{100 * numbers['kept_share']:.1f} %"
    assert shown["n-mass"] == f"{100 * numbers['mass_kept']:.1f} %"
    prompt = done.stdout.partition('id="prompt"')[2].partition("</div>")[0]
    assert len(re.findall("<span", prompt)) == numbers["prompt_tokens"]
    about = re.search(r'id="about"[^>]*>([^<]*)<', done.stdout)
    assert about is not None and about[1].startswith(f"Token 3 of {numbers['prompt_tokens']}")
    cells = re.findall(r'title="(\d+) of \d+ tokens"', done.stdout)
    assert cells == ["32"] * 12
