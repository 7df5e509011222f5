"""`kv-lm-eval inspect`: what it says was kept was kept, its attention is the model's own, and the page shows both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import browser
import pytest
import tiny as models
import torch

from kv_lm_eval import cli, tiny
from kv_lm_eval.analysis import inspect
from kv_lm_eval.analysis.kept import look
from kv_lm_eval.serving.served import Served

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


def test_a_browser_shows_the_numbers_and_what_was_kept(out, tab):
    numbers = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    tab.open(out / "inspect.html", "#token=3")
    assert tab.texts("#n-tokens") == [str(numbers["prompt_tokens"])]
    assert tab.texts("#n-kept") == [f"{100 * numbers['kept_share']:.1f} %"]
    assert tab.texts("#n-mass") == [f"{100 * numbers['mass_kept']:.1f} %"]
    assert tab.js("document.querySelectorAll('#prompt span').length") == numbers["prompt_tokens"]
    assert tab.texts("#about")[0].startswith(f"Token 3 of {numbers['prompt_tokens']}")
    titles = tab.js("[...document.querySelectorAll('#mass td[title]')].map((cell) => cell.title)")
    assert [title.split()[0] for title in titles] == ["32"] * 12


def test_pointing_at_a_token_and_at_the_map_tells_their_scores(out, tab):
    """The last window of snapkv is kept by every head; the arrow keys walk; a row of the map is a layer."""
    numbers = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    last = numbers["prompt_tokens"] - 1
    tab.open(out / "inspect.html")
    tab.point(f"#prompt span:nth-child({last + 1})")
    (about,) = tab.texts("#about")
    assert about.startswith(f"Token {last} of") and "kept by 100.0 % of the heads, attention " in about
    assert float(re.search(r"attention ([\d.]+) %", about)[1]) > 0
    shares = [float(x) for x in re.findall(r"\d+: (\d+) %", about.partition("By layer")[2])]
    assert shares == [100] * len(numbers["kept_by_head"])
    tab.js("document.querySelector('#prompt').focus()")
    tab.key("ArrowLeft")
    assert tab.texts("#about")[0].startswith(f"Token {last - 1} of")
    tab.point("#map")
    assert re.search(r"Layer \d+: head 0 (kept|gone) \([\d.]+ %\)", tab.texts("#about")[0])
    assert "KL " in tab.js("document.querySelector('#full span').title")


def test_the_page_in_the_dark_and_on_a_phone(out, tab):
    with tab.seen(width=390, dark=True):
        tab.open(out / "inspect.html")
        assert tab.js("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert max(tab.colour("body", "backgroundColor")) < 60 and min(tab.colour("body", "color")) > 180


@pytest.mark.parametrize("dark", [False, True])
def test_words_are_read_on_their_colour(out, tab, dark):
    """4.5 to 1 on what every head kept and on the largest divergence."""
    with tab.seen(dark=dark):
        tab.open(out / "inspect.html")
        last = tab.js("document.querySelectorAll('#prompt span').length")
        worst = 1 + tab.js("D.kl.indexOf(Math.max(...D.kl))")
        ink, paper = tab.colour("#prompt", "color"), tab.colour("#prompt", "backgroundColor")
        for token in (f"#prompt span:nth-child({last})", f"#full span:nth-child({worst})"):
            under = tab.js(f"getComputedStyle(document.querySelector('{token}')).backgroundColor")
            *colour, share = (float(x) for x in re.findall(r"[\d.]+", under))
            assert share >= 0.4  # and the colour is seen
            assert (
                browser.contrast(ink, [share * c + (1 - share) * p for c, p in zip(colour, paper, strict=True)]) >= 4.5
            )
