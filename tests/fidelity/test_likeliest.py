"""One sample of a task token by token: the likeliest tokens of both caches, the stretch that is shown, one a task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kv_lm_eval import tiny
from kv_lm_eval.metrics import divergence
from kv_lm_eval.metrics.divergence import Divergence, Top, joined, of_logits
from kv_lm_eval.requests import kept_answers, likeliest
from kv_lm_eval.requests.beside import Beside
from kv_lm_eval.requests.samples import Text

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_likeliest_tokens_are_those_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "BLOCK_ELEMENTS", 100)  # blocks of two tokens
    base, ours = torch.randn(7, 50, dtype=torch.float64), torch.randn(7, 50, dtype=torch.float64)
    targets = torch.zeros(7, dtype=torch.long)
    parts = [of_logits(base[a:b], ours[a:b], targets[a:b], True) for a, b in ((0, 4), (4, 7))]
    found = joined(parts)
    assert found.top is not None and of_logits(base, ours, targets).top is None
    for i in range(7):
        for side, logits in enumerate((base[i], ours[i])):
            order = sorted(range(50), key=lambda t, x=logits: -float(x[t]))[:5]
            assert found.top.ids[i, side].tolist() == order
            assert found.top.probs[i, side] == pytest.approx(logits.softmax(-1)[order].cpu().numpy(), rel=1e-5)
    assert joined([parts[0], of_logits(base[4:], ours[4:], targets[4:])]).top is None
    few = of_logits(base[:2, :3], ours[:2, :3], targets[:2], True)
    assert few.top is not None and few.top.ids.shape == (2, 2, 3)


def numbers(kl: list[float]) -> Divergence:
    n = len(kl)
    ids = np.tile(np.arange(5, dtype=np.int32), (n, 2, 1))
    logs = np.full(n, np.log(0.25))
    top = Top(ids, np.full((n, 2, 5), 0.2, dtype=np.float32))
    return Divergence(np.array(kl), logs, logs, np.ones(n, dtype=bool), top)


def letters(ids: list[int]) -> str:
    """A token's blank is lost where it stands first, as with sentencepiece."""
    return "".join(f" {'abcdefgh'[i]}" for i in ids).lstrip()


def test_the_stretch_with_the_largest_divergence_is_shown_as_it_reads() -> None:
    kl = [0.1] * 1000
    kl[700] = 9.0
    shown = likeliest.view(numbers(kl), [i % 8 for i in range(1000)], [], letters)
    assert shown is not None and shown["start"] <= 700 < shown["start"] + len(shown["tokens"])
    assert len(shown["tokens"]) == likeliest.MOST_TOKENS
    short = likeliest.view(numbers([0.5, np.inf]), [1, 2], [7], letters)
    assert short == {
        "start": 0,
        "tokens": [
            {"text": text, "kl": kl, "top_base": top, "top": top, "p_base": 0.25, "p": 0.25}
            for text, kl in ((" b", 0.5), (" c", None))
            for top in [[[f" {x}", 0.2] for x in "abcde"]]
        ],
    }
    one = numbers([0.5])
    one.top = None
    assert likeliest.view(one, [1], [], letters) is None and likeliest.view(numbers([]), [], [], letters) is None


def test_it_is_kept_with_the_answer() -> None:
    ids = np.arange(2, dtype=np.int32)
    shown = likeliest.view(numbers([0.5, np.inf]), [1, 2], [7], letters)
    one = Text("a", beside=Beside("b", numbers([1, 2]), numbers([1, 2]), ids, ids, view=shown))
    assert kept_answers.decode(kept_answers.encode(one), "here").beside.view == shown


@pytest.mark.parametrize("task", ["kv_quickstart_needle", "kv_fidelity_file"])
def test_the_first_sample_of_a_task_has_it_and_says_what_came(run, task) -> None:
    texts = str(Path(tiny.__file__).parents[1] / "tasks" / "quickstart" / "texts")
    metadata = {"text_files": texts, "max_eval_tokens": 150} if task == "kv_fidelity_file" else None
    results = run(task, limit=2, metadata=metadata, fidelity=True, method="streaming_llm", n_sink=4, window_size=60)
    first, second = results["samples"][task]

    def of(sample):
        return sample["fidelity"][0] if "fidelity" in sample else sample["doc"]["per_token"]

    view, kl = of(first)["view"], of(first)["kl"]
    assert "view" not in of(second)
    at = view["start"]
    assert [t["kl"] for t in view["tokens"]] == kl[at : at + len(view["tokens"])]
    text = "".join(t["text"] for t in view["tokens"])
    if "base" in of(first):
        assert text.strip().startswith(of(first)["base"].strip())  # a stop may follow
    else:
        assert text in first["doc"]["text"]
    for token, same in zip(view["tokens"], of(first)["same_top"][at:], strict=False):
        assert not same or token["top_base"][0][0] == token["top"][0][0]
        assert all(0 <= p <= 1 for side in ("top", "top_base") for _, p in token[side])
