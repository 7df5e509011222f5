"""Facts lie where the documents say, in text of any script: counted anew from the prompt's own tokens."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
import regex
from needle_tokenizers import NAMES, load

from kv_lm_eval.tasks.needle import tasks
from kv_lm_eval.tasks.needle.borders import LEVELS, nearest_before
from kv_lm_eval.tasks.needle.haystack import MOST_TOLERANCE, TOLERANCE, Counter, tolerance

TEXTS = {
    "English": "The boats lay still in the harbour. Nobody, he said, had come; why not? (It was late.) Number {} rang.",
    "no capitals": "the boats lay still in the harbour. nobody had come, e.g. at {}; why not? it was late.",
    "no stops": "the boats lay still in the harbour and nobody had come at {} because it was late",
    "Russian": "Лодки стояли в гавани. Никто, сказал он, не пришёл; почему? «Было поздно». В {} часов звонили.",
    "Russian, small": "лодки стояли в гавани. никто не пришёл в {}; почему? было поздно.",
    "Greek": "Οι βάρκες ήταν στο λιμάνι. Κανείς δεν ήρθε στις {}· γιατί; Ήταν αργά.",
    "Chinese": "船停在港口里。没有人来，他说；为什么？「已经{}点了。」钟响了！",
    "Chinese, no stops": "船停在港口里没有人来他说为什么已经{}点了钟响了",
    "Japanese": "船は港に止まっていた。誰も来なかった、なぜだろう？もう{}時だった。",
    "Thai": "เรือจอดนิ่งอยู่ในท่าเรือไม่มีใครมาเพราะมันสายแล้วตอน{}โมง",
    "Arabic": "كانت القوارب في الميناء. لم يأت أحد، قال؛ لماذا؟ كان الوقت متأخرا {}.",
    "Hindi": "नावें बंदरगाह में थीं। कोई नहीं आया, उसने कहा; क्यों? {} बजे देर हो गई थी।",
    "Korean": "배는 항구에 있었다. 아무도 오지 않았다, 왜? {}시였다.",
    "code": "def f_{}(x): return [g(y) for y in x if y.ok()] # sum; see g.h {{'a': 1}}",
    "one line of letters": "abcdefghijklmnopqrstuvwxyz{}",
    "one line of digits": "31415926535{}",
    "one letter": "aaaaaaaaaaaaaaaaaaaaaaaaa",
    "emoji": "👩‍👩‍👧‍👦👍🏽🇫🇷e\u0301{}",
    "blanks": "a  {}\t b\u3000c \u2003 d",
}
DEPTHS = (0, 3, 10, 33.3, 50, 77, 90, 99, 100)


@pytest.fixture(scope="module")
def haystacks(tmp_path_factory):
    where = tmp_path_factory.mktemp("scripts")
    for name, text in TEXTS.items():
        (where / name).mkdir()
        joint = "" if name in ("Thai", "emoji") or name.startswith(("one", "Chinese", "Japanese")) else " "
        pieces = (text.format(i) if "{" in text else text for i in range(20_000 // len(text)))
        (where / name / "text.txt").write_text(joint.join(pieces), encoding="utf-8")
    return where


def reached(tokenizer, context: str, fact: str, head: str, tail: str) -> float:
    """Per cent of the filler's tokens before a fact, by the offsets of the whole prompt's tokens."""
    encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begin, end = context.index(fact), context.index(fact) + len(fact)
    ends = [stop for start, stop in encoded.offset_mapping if stop > start]
    before = sum(len(head) < stop <= begin for stop in ends)
    after = sum(end < stop <= len(context) - len(tail) for stop in ends)
    return 100 * before / (before + after)


@pytest.mark.parametrize("tokenizer_name", NAMES)
@pytest.mark.parametrize("script", TEXTS)
def test_asked_and_reached_depth_agree_and_are_recorded_as_they_are(haystacks, script, tokenizer_name, caplog):
    tokenizer = load(tokenizer_name)
    settings = tasks.Settings(
        lengths=(300, 1500), depths=DEPTHS, samples_per_cell=1, haystack_dir=str(haystacks / script)
    )
    rows = list(tasks._rows(tasks.MAGIC, settings, Counter(tokenizer)))
    source = (haystacks / script / "text.txt").read_text(encoding="utf-8")
    for row in rows:
        fact = f"The special magic number for {row['needle_ids'][0].split(':')[1]} is {row['expected'][0]}."
        head, tail = "The following text mentions special magic numbers. Remember them.\n\n", "\n\n"
        context, asked = row["context"], row["document_depth_percent"]
        assert context.startswith(head) and context.endswith(tail) and context.count(fact) == 1
        found = reached(tokenizer, context, fact, head, tail)
        (said,) = row["needle_depth_percents"]
        filler = row["filler_tokens"]
        assert said == pytest.approx(found, abs=0.2 + 100 * 4 / filler), (asked, said, found)
        one_character = 100 * 30 / filler if script == "emoji" else 0  # a family of four takes up to thirty tokens
        assert -0.01 <= asked - said <= tolerance(filler) + 0.01 + one_character
        assert row["asked_depth_percents"] == [asked]
        assert {0: said == 0, 100: said == 100}.get(asked, True)
        # Nothing is lost, nothing is torn: the filler is a stretch of the text, and no visible character is cut.
        begin = context.index(fact)
        one, two = context[len(head) : begin], context[begin + len(fact) : -len(tail)]
        around = (" ".join(source.split()) + " ") * 2
        assert one.strip() in around and two.strip() in around
        for part in (one.strip(), two.strip()):
            assert not part or unicodedata.combining(part[0]) == 0 and part[0] not in "\u200d\ufe0f"
        room = row["context_length"] - tasks.MAGIC.max_new_tokens - row["length_tokens"]
        assert 0 <= room <= 30


@pytest.mark.parametrize("script", TEXTS)
def test_samples_have_different_text(haystacks, script):
    if script in ("one letter",):
        return
    settings = tasks.Settings(lengths=(300,), depths=(0,), samples_per_cell=3, haystack_dir=str(haystacks / script))
    rows = list(tasks._rows(tasks.MAGIC, settings, Counter(load("kv-tiny"))))
    assert len({row["context"].split(".", 2)[2] for row in rows}) == 3


def test_a_border_is_of_the_first_kind_that_has_one_near_enough():
    text = "One two. Three, four five, six-seven eightnine"
    kinds = dict(zip("sentence clause space word character".split(), LEVELS, strict=True))
    for earliest, latest in itertools.combinations(range(len(text) + 1), 2):
        borders = {
            kind: [m.end() for m in level.finditer(text) if earliest <= m.end() <= latest]
            for kind, level in kinds.items()
        }
        expected = next(0 if not b else b[-1] for b in borders.values() if b or earliest == 0)
        assert nearest_before(text, earliest, latest) == expected
    assert nearest_before(text, 1, 12) == text.index("Three")
    assert nearest_before(text, 16, 24) == text.index("four")
    assert regex.findall(r"\X", "e\u0301") == ["e\u0301"] and nearest_before("e\u0301" * 9, 3, 3) == 2


def test_what_lies_too_far_off_is_said_once(caplog, tmp_path):
    """One word takes a fifth of the text: no border can be near."""
    (tmp_path / "a.txt").write_text("👩‍👩‍👧‍👦 " * 400, encoding="utf-8")
    metadata = {"lengths": [140], "depths": [0, 50, 90], "samples_per_cell": 2, "pretrained": "kv-tiny"}
    rows = tasks.magic(**metadata, haystack_dir=str(tmp_path))["test"].to_list()
    off = [row["document_depth_percent"] - row["needle_depth_percents"][0] for row in rows]
    (said,) = [r.getMessage() for r in caplog.records if "from the depth asked for" in r.getMessage()]
    assert max(off) > MOST_TOLERANCE and f"up to {max(off):.1f} per cent" in said
    caplog.clear()
    tasks.magic(**{**metadata, "lengths": [1024]})
    assert "from the depth asked for" not in caplog.text


def test_facts_of_every_task_lie_where_they_should(caplog):
    for build in (tasks.classic, tasks.multikey, tasks.multivalue, tasks.multiquery, tasks.multi, tasks.vt):
        rows = build(pretrained="kv-tiny", lengths=[1024], depths=[0, 30, 100], samples_per_cell=2)["test"].to_list()
        for row in rows:
            pairs = zip(row["asked_depth_percents"], row["needle_depth_percents"], strict=True)
            assert all(0 <= asked + 0.01 - reached <= TOLERANCE + 0.02 for asked, reached in pairs)
    assert "from the depth asked for" not in caplog.text
