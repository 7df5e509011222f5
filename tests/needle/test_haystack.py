"""Haystacks have the length, the depths and the needles that they state, for every tokenizer."""

from __future__ import annotations

import functools

import pytest
from needle_tokenizers import NAMES, data, load

from kv_lm_eval.tasks.needle import haystack, tasks
from kv_lm_eval.tasks.needle.borders import sentences
from kv_lm_eval.tasks.needle.haystack import TOLERANCE, Counter, Source, hide, load_source, tolerance, window

LENGTHS, DEPTHS = (256, 777, 2500), (0, 37.5, 90, 100)


def rows(name: str, task: tasks.Task = tasks.MAGIC, **settings) -> list[dict]:
    given = tasks.Settings(**{"lengths": LENGTHS, "depths": DEPTHS, "samples_per_cell": 3, **settings})
    return list(tasks._rows(task, given, Counter(load(name))))


@functools.cache
def magic_rows(name: str) -> list[dict]:
    return rows(name)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_never_pass_their_length_and_miss_it_by_a_word_at_most(name):
    tokenizer, found = load(name), magic_rows(name)
    assert len(found) == len(LENGTHS) * len(DEPTHS) * 3
    for row in found:
        prompt = row["context"] + row["question"] + " " + row["gen_prefix"]
        assert row["length_tokens"] == len(tokenizer(prompt).input_ids)
        assert 0 <= row["context_length"] - tasks.MAGIC.max_new_tokens - row["length_tokens"] <= 12


@pytest.mark.parametrize("name", NAMES)
def test_the_needle_begins_the_last_sentence_within_tolerance_of_its_depth_if_there_is_one(name):
    tokenizer = load(name)
    for row in magic_rows(name):
        (statement,) = [s for s in [f"is {row['expected'][0]}."] if row["context"].count(s) == 1]
        start = row["context"].index("The special magic number for")
        head = row["context"].index("\n\n") + 2
        filler = row["context"][head:start] + row["context"][row["context"].index(statement) + len(statement) + 1 :]
        total = len(tokenizer(filler.strip(), add_special_tokens=False).input_ids)
        target = row["document_depth_percent"]
        (reached,) = row["needle_depth_percents"]
        before = len(tokenizer(row["context"][head:start].rstrip(), add_special_tokens=False).input_ids)
        assert reached == pytest.approx(100 * before / total, abs=2.5 * 100 / total + 0.01)
        assert reached <= target
        if target == 100:
            assert reached == 100
            continue
        allowed = tolerance(row["filler_tokens"])
        assert reached >= target - allowed - 0.01
        borders = sentences(filler)
        if start - head not in borders:
            shares = [100 * len(tokenizer(filler[:b].rstrip(), add_special_tokens=False).input_ids) / total
                      for b in borders]  # fmt: skip
            assert not any(target - allowed + 1.5 < share <= target - 1.5 for share in shares)
            assert filler[start - head - 1].isspace()
            continue
        later = [b for b in borders if b > start - head]
        if later:
            next_one = len(tokenizer(filler[: later[0]].rstrip(), add_special_tokens=False).input_ids)
            assert 100 * (next_one + 3) / total > target


def test_samples_of_a_cell_differ_and_depths_share_their_text():
    found = rows("kv-tiny", lengths=(512,), depths=(0, 50))
    by_depth = {d: [r for r in found if r["document_depth_percent"] == d] for d in (0, 50)}
    for group in by_depth.values():
        assert len({r["needle_ids"][0] for r in group}) == 3
        assert len({r["context"][-100:] for r in group}) == 3
    for first, second in zip(by_depth[0], by_depth[50], strict=True):
        assert second["context"][:120].split("\n\n")[1] in first["context"]


def test_documents_are_seeded():
    assert rows("kv-tiny", lengths=(300,)) == rows("kv-tiny", lengths=(300,))
    assert rows("kv-tiny", lengths=(300,)) != rows("kv-tiny", lengths=(300,), needle_seed=1)


def test_a_window_goes_round_and_says_when_it_repeats():
    text = "One two three. Four five six. Seven eight nine. Ten eleven twelve."
    counter, source = Counter(load("kv-tiny")), Source("short", text)
    once = counter.count(text)
    assert window(source, 0, once - 2, counter).repeats == 0
    half = window(source, 0.5, once - 4, counter)
    assert half.repeats == 0 and half.text.startswith("Seven") and "One two" in half.text
    assert window(source, 0, 2 * once - 4, counter).repeats == 1
    assert window(source, 0, 4 * once, counter).repeats in (3, 4)


def test_repeated_haystacks_are_logged_and_recorded(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("One two three. Four five six. " * 8)
    found = rows("kv-tiny", lengths=(1024,), depths=(50,), haystack_dir=str(tmp_path))
    assert found[0]["haystack_repeats"] >= 1 and found[0]["haystack"] == tmp_path.name
    assert "repeats the haystack" in caplog.text
    assert all(row["haystack_repeats"] == 0 for row in rows("kv-tiny", depths=(50,)))


def test_a_folder_of_essays_is_a_haystack():
    source = load_source(folder=str(data("text", "essays")))
    assert source.name == "essays" and len(source.text) > 500_000 and "\n" not in source.text
    found = rows("kv-tiny", lengths=(512,), haystack_dir=str(data("text", "essays")))
    assert found[0]["haystack_sha256"] == source.sha256


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no .txt or .md file below"):
        load_source(folder=str(tmp_path))


def test_the_default_haystack_is_prose_of_some_length_without_repeats():
    text = load_source().text
    found = [text[a:b] for a, b in zip(*(lambda s: (s, s[1:]))(sentences(text)), strict=False)]
    assert len(text) > 150_000
    assert len(set(s for s in found if len(s) > 40)) > 0.97 * len([s for s in found if len(s) > 40])


def test_sentences_end_at_stops_before_capitals():
    assert sentences("One. Two? (Three.) Four") == [0, 5, 10, 19]
    assert sentences("e.g. this, 3.5 of it") == [0]
    assert sentences("") == [0]
    assert sentences("第一。第二。") == [0, 3]
    assert sentences("他说：「第一。」第二！？第三") == [0, 8, 12]
    assert sentences("Раз, т.е. один. Два! «Три.» Четыре") == [0, 16, 21, 28]
    assert sentences("مرحبا. كيف؟ نعم.") == [0, 7, 12]
    assert sentences("एक। दो। तीन") == [0, 4, 8]


def test_filler_without_a_sentence_takes_its_needle_between_words():
    counter = Counter(load("kv-tiny"))
    words = window(Source("words", "word " * 200), 0, 100, counter)
    for depth in (0, 60, 100):
        hidden = hide(words, ["Needle here."], [depth], 60, counter, lambda t: (t, t))
        assert hidden.depths[0] == pytest.approx(depth, abs=TOLERANCE)
        assert hidden.context.replace("Needle here.", "").split() == ["word"] * hidden.context.count("word")
        assert hidden.context.startswith("Needle") == (depth == 0)
        assert hidden.context.endswith("Needle here.") == (depth == 100)


def test_too_short_lengths_are_refused():
    counter = Counter(load("kv-tiny"))
    with pytest.raises(ValueError, match="holds not even its template and facts"):
        hide(window(load_source(), 0, 50, counter), ["A fact."] * 20, [0] * 20, 50, counter, lambda t: (t, t))
    with pytest.raises(ValueError, match="leaves no prompt"):
        rows("kv-tiny", lengths=(40,))


def test_facts_at_one_place_keep_their_order():
    counter = Counter(load("kv-tiny"))
    text = window(load_source(), 0, 300, counter)
    context = hide(text, ["First.", "Second.", "Third."], [100, 100, 0], 200, counter, lambda t: (t, t)).context
    assert context.startswith("Third. ") and context.endswith(" First. Second.")


def test_a_tokenizer_without_offsets_still_never_passes_the_length():
    class Slow:
        is_fast, name_or_path = False, "slow"

        def __call__(self, text, **_):
            return type("Encoding", (), {"input_ids": [0] * -(-len(text) // 3)})

    counter = Counter(Slow())
    for row in tasks._rows(tasks.MAGIC, tasks.Settings(lengths=(400,)), counter):
        assert 0 <= 400 - 48 - row["length_tokens"] <= 8


def test_an_empty_tokenizer_is_refused():
    class Empty:
        is_fast, name_or_path = True, "nothing"

        def __call__(self, text, **_):
            return type("Encoding", (), {"input_ids": []})

    with pytest.raises(ValueError, match="finds no tokens"):
        Counter(Empty())


def test_essays_of_the_hub_are_asked_for_by_name(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append(name) or {"text": ["One.", "Two."]})
    haystack.load_source.cache_clear()
    assert load_source("essays").text == "One. Two."
    assert load_source("me/mine").name == "me/mine"
    assert asked == [haystack.ESSAYS_DATASET, "me/mine"]
    haystack.load_source.cache_clear()
