"""question_in_prompt=False: the question is found in real prompts, and the context is compressed before it is seen."""

from __future__ import annotations

import lm_eval
import pytest
import transformers
from lm_eval.api.instance import Instance
from model.test_requests import STORY, load

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries
from kv_lm_eval.tasks.quickstart import docs

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
AGNOSTIC = {"question_in_prompt": False}
METHODS = [
    {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8},
    {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8, "compress_every": 4},
    {"method": "streaming_llm", "window_size": 28, "compress_every": 4},
    {"method": "h2o", "max_capacity_prompt": 32},
]
QUESTIONS = ("The special magic number for harbour is", "Who saw the ferry? The special magic number is", "Number:")


def question(kind: str, n: int, *rest: object) -> Instance:
    """A prompt that holds the question twice: the last one counts."""
    asked = QUESTIONS[n % 3]
    doc = {"question": asked, "text": STORY}
    return Instance(kind, doc, (f"{asked} {STORY * n} {asked}", *rest), 0, ("t", 0, 1))


def answers(lm) -> tuple[list[str], list[float]]:
    generations = [question("generate_until", n, {"until": ["\n"], "max_gen_toks": 8}) for n in (1, 3, 2, 4)]
    choices = [question("loglikelihood", n, f" {c}") for n in (1, 3, 2, 4) for c in (48213, 9, 777)]
    scores = [s for s, _ in lm.loglikelihood(choices, disable_tqdm=True)]
    return lm.generate_until(generations, disable_tqdm=True), scores


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_answers_do_not_depend_on_the_batch_and_differ_from_those_with_the_question_in_the_prompt(settings):
    one, four = (answers(load("kvcompressed", batch_size=n, **settings, **AGNOSTIC)) for n in (1, 4))
    assert one[0] == four[0]
    assert one[1] == pytest.approx(four[1], abs=2e-4)
    aware = answers(load("kvcompressed", **settings))
    assert max(abs(a - b) for a, b in zip(one[1], aware[1], strict=True)) > 1e-3


def test_without_compression_nothing_changes():
    assert answers(load("kvcompressed", method="full", **AGNOSTIC)) == answers(load("kvcompressed", method="full"))


def test_a_budget_beyond_the_prompts_gives_the_full_caches_answers():
    full = answers(load("kvcompressed", method="full"))
    got = answers(load("kvcompressed", method="snapkv", max_capacity_prompt=2000, **AGNOSTIC))
    assert got[0] == full[0]
    assert got[1] == pytest.approx(full[1], abs=2e-4)


def test_sampling_stops_and_beams_work_over_the_compressed_context():
    lm = load("kvcompressed", **METHODS[0], **AGNOSTIC)
    for more in ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"num_beams": 3}):
        settings = {"until": ["48"], "max_gen_toks": 8, **more}
        got = lm.generate_until([question("generate_until", n, settings) for n in (2, 1)], disable_tqdm=True)
        assert len(got) == 2 and not any("48" in answer for answer in got)
    stats = lm.get_model_info()["kv_stats"]
    assert stats["requests"] == 2, "the same two prompts"


def test_results_say_how_many_tokens_followed_the_compression_and_how_many_had_no_question():
    lm = load("kvcompressed", **METHODS[0], **AGNOSTIC)
    count = {n: len(lm.tok_encode(QUESTIONS[n % 3], add_special_tokens=False)) for n in (1, 2, 3, 4)}
    answers(lm)
    info = lm.get_model_info()
    assert info["kv_compression"]["question_in_prompt"] is False
    assert info["kv_stats"]["question_tokens"]["max"] in (max(count.values()), max(count.values()) + 1)
    assert info["kv_stats"]["empty_questions"] == 0
    summary = Instance(
        "generate_until", {"input": "", "context": STORY * 3 + "\n"}, (f"{STORY * 3}\n\nSummary:", {"until": []}), 0
    )
    summary.args[1]["max_gen_toks"] = 4
    lm.generate_until([summary], disable_tqdm=True)
    stats = lm.get_model_info()["kv_stats"]
    assert stats["empty_questions"] == stats["requests"] == 1, "what was told before is not counted again"
    assert stats["question_tokens"]["max"] < 12


@pytest.mark.parametrize(
    ("doc", "settings", "message"),
    [
        (
            {"passage": "x"},
            {},
            "no text named question or input or .*only passage.*question_field=.*question_in_prompt=T",
        ),
        ({"question": "something else?"}, {}, "of t\\? the text of its question is not in the prompt"),
        ({"question": "Number:"}, {"question_field": "q"}, "no text named q, only question"),
    ],
)
def test_a_question_that_cannot_be_found_stops_the_run_before_any_work(doc, settings, message, monkeypatch):
    lm = load("kvcompressed", **METHODS[0], **AGNOSTIC, **settings)
    monkeypatch.setattr(lm.model, "forward", None)
    for kind, second in (("generate_until", {"until": ["\n"]}), ("loglikelihood", " 4")):
        with pytest.raises(UserError, match=message):
            getattr(lm, kind)([Instance(kind, doc, (STORY + "Number:", second), 0, ("t", 0, 1))], disable_tqdm=True)


def test_a_question_field_with_the_question_in_the_prompt_is_refused():
    with pytest.raises(UserError, match="question_field=q has no effect"):
        load("kvcompressed", method="full", question_field="q")


def find(prompt: str, doc: dict[str, object], field: str | None = None) -> tuple[str, bool]:
    """The part of the prompt that is fed after the compression; a token a character here."""
    got = boundaries.find(prompt, doc, field, "t", lambda text, start: len(text) - start)
    return prompt[len(prompt) - got.tail_tokens :], got.empty


def test_where_the_question_of_a_document_begins():
    shots = "Q: red? A: yes\n\nQ: red? A:"
    assert find(shots, {"question": "red?"}) == ("red? A:", False)
    assert find("<user> text, blue </user>", {"question": {"stem": 1}, "input": " blue\n"}) == ("blue </user>", False)
    assert find("a b c", {"question": "b", "focus": "c"}, "focus") == ("c", False)
    long = "x" * 50 + "the very end of a report, whose middle may be gone.\n"
    cut = f"Report: {long[60:]}\nNow summarise."
    assert find(cut, {"input": "", "context": long}) == ("\n\nNow summarise.", True)
    assert find("def f():", {"input": "", "context": "elsewhere"}) == (":", True), "the last token is always fed"


def test_tokens_that_lie_wholly_before_the_question_with_and_without_offsets():
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
    for context in (STORY, STORY.strip() + "\n\n", "é日本\n", "a", ""):
        for asked in ("What is it?", "Číslo: 12345"):
            for tail in ("", "\nAnswer:"):
                text, start = context + asked + tail, len(context)
                encoded = tokenizer(text, return_offsets_mapping=True)
                by_offsets = boundaries.tokens_by_offsets(encoded["offset_mapping"], start)
                spans = encoded["offset_mapping"][len(encoded["input_ids"]) - by_offsets :]
                before = encoded["offset_mapping"][: len(encoded["input_ids"]) - by_offsets]
                assert spans[0][1] > start and all(end <= start for _, end in before)
                by_prefix = boundaries.tokens_by_prefix(lambda s: tokenizer(s)["input_ids"], text, start)
                assert 0 <= by_prefix - by_offsets <= 2


@pytest.mark.parametrize("task", ["kv_quickstart_needle", "kv_quickstart_choice", "kv_needle_magic", "kv_needle_vt"])
def test_our_tasks_name_their_questions(task):
    with plugin.only_our_tasks():
        got = lm_eval.simple_evaluate(
            model="kvcompressed",
            model_args={"pretrained": "kv-tiny", **METHODS[0], **AGNOSTIC},
            tasks=[task],
            limit=2,
            batch_size=2,
            metadata={"lengths": [256], "depths": [50, 100], "samples_per_cell": 1},
            bootstrap_iters=0,
            device="cpu",
        )
    stats = got["config"]["kv_stats"]
    assert stats["empty_questions"] == 0
    assert 10 < stats["question_tokens"]["min"] <= stats["question_tokens"]["max"] < 80


def test_quickstart_questions_stand_at_the_end_of_their_prompts():
    for build in (docs.needle, docs.choice):
        assert all(row["prompt"].endswith("\n\n" + row["question"]) for row in build()["test"])
