"""Where the question begins, and prompts in which nothing stands before it."""

from __future__ import annotations

import importlib

import pytest
import transformers
from lm_eval.api.instance import Instance
from model.test_requests import STORY, load

from kv_lm_eval import tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries

pytestmark = pytest.mark.filterwarnings("ignore")
SNAPKV = {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8, "question_in_prompt": False}
KINDS = (("generate_until", {"until": ["\n"], "max_gen_toks": 4}), ("loglikelihood", " 4"))


def find(prompt: str, doc: dict[str, object], field: str | None = None) -> str:
    """The part of the prompt that is fed after the compression; a token a character here."""
    got = boundaries.find(prompt, doc, field, "t", lambda text, start: len(text) - start)
    return prompt[len(prompt) - got.tail_tokens :]


# lm-eval's documents hold the whole prompt in `input`, and its beginning of the answer in `gen_prefix`.
READ = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
GIVEN = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
RULER = {
    "niah_single": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{STORY * 3}\n",
        "What is the special magic number for harbour mentioned in the provided text?",
        "The special magic number for harbour mentioned in the provided text is",
    ),
    "niah_multiquery": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the numbers afterwards.\n{STORY * 3}\n",
        "What are all the special magic numbers for harbour, and ferry mentioned in the provided text?",
        "The special magic numbers for harbour, and ferry mentioned in the provided text are",
    ),
    "vt": (
        f"{READ}VAR A = 1 VAR B = A\nQuestion: Find all variables that are assigned the value 1 in the text above. "
        f"Answer: A B\n\n{READ}{STORY * 2} VAR X = 7\n",
        "Question: Find all variables that are assigned the value 7 in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assgined the "
        "value 7, they are:",
    ),
    "cwe": (
        "Below is a numbered list of words. Memorize the ones that appear most often.\n1. a 2. b\nQuestion: What are "
        "the 10 most common words in the above list? Answer: The top 10 words are: 1. a\nBelow is a numbered list of "
        f"words.\n{' '.join(f'{i}. gull' for i in range(80))}\n",
        "Question: What are the 10 most common words in the above list?",
        "Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {'... xyz abc ' * 60}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa": (
        f"{GIVEN}The following are given documents.\n\n{STORY * 3}\n\n",
        f"{GIVEN}Question: Who saw the ferry?",
        "Answer:",
    ),
}


@pytest.mark.parametrize("task", RULER)
@pytest.mark.parametrize("around", [("", ""), ("<s>[INST] You are a helpful assistant.\n", " [/INST]")])
def test_the_question_of_a_ruler_prompt_is_found_in_its_wording(task, around):
    context, question, prefix = RULER[task]
    doc = {"index": 0, "input": context + question, "outputs": ["x"], "gen_prefix": prefix, "max_length": 4096}
    tail = f"{question}{around[1]} {prefix}"
    for field in (None, "input"):
        assert find(f"{around[0]}{context}{tail}", doc, field) == tail


def test_the_wording_is_that_of_lm_evals_own_tasks():
    """Those of its modules that can be imported without further packages or data."""
    for module in ("niah_utils", "vt_utils", "fwe_utils", "cwe_utils", "qa_utils"):
        try:
            utils = importlib.import_module(f"lm_eval.tasks.ruler.{module}")
        except ImportError:
            continue
        template = utils.TEMPLATE
        for text in (template, template.replace("are all", "is")) if module == "niah_utils" else (template,):
            (*_, last) = boundaries.RULER_QUESTION.finditer(text)
            assert "{context}" not in text[last.start() :] and "{context}" in text[: last.start()]


def test_fwe_prompts_that_lm_eval_makes_are_split_before_their_question():
    fwe = importlib.import_module("lm_eval.tasks.ruler.fwe_utils")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
    doc = fwe.sys_kwext(tokenizer, max_seq_length=800, num_samples=1)[0]
    lm = load("kvcompressed", **SNAPKV)
    prompt = f"{doc['input']} {doc['gen_prefix']}"
    lm.generate_until([Instance(*KINDS[0][:1], doc, (prompt, KINDS[0][1]), 0, ("fwe", 0, 1))], disable_tqdm=True)
    (record,) = lm.compression_log.records
    tail = prompt[prompt.index("Question: Do not") :]
    asked = len(lm.tok_encode(tail))
    assert record.question_tokens in (asked, asked + 1) and asked < record.prompt_tokens / 5 and record.compressed


# What the benchmarks ask with, by lm-eval's tasks: (prompt, document, the tail).
ELSEWHERE = {
    "babilong": (
        f"{STORY * 2}\nWhere is Charlie?",
        {"input": STORY * 2, "question": "Where is Charlie?"},
        "Where is Charlie?",
    ),
    "infinitebench passkey": (
        f"{STORY * 2}\n\nWhat is the pass key?",
        {"context": STORY * 2, "input": "What is the pass key?", "answer": ["1"]},
        "What is the pass key?",
    ),
    "infinitebench longbook_qa": (
        f"{STORY * 2}\n\nQuestion: Who saw it?\n\nBe very concise.",
        {"context": STORY * 2, "input": "Who saw it?", "answer": ["x"]},
        "Who saw it?\n\nBe very concise.",
    ),
    "infinitebench code_run, in other words": (
        f"Following is a set of functions.\n\n{STORY * 2}\n\nPlease give me the value of func_1(3). Be concise.",
        {"context": STORY * 2, "input": "Please give me the exact number of func_1(3).", "answer": ["x"]},
        "\n\nPlease give me the value of func_1(3). Be concise.",
    ),
    "infinitebench longdialogue, no question": (
        f"Below is a dialogue script.\n\n{STORY * 2}\n\nThe name that has been replaced is most likely",
        {"context": STORY * 2, "input": "", "answer": ["x"]},
        "\n\nThe name that has been replaced is most likely",
    ),
    "loogle": (
        f"Please answer by the text: {STORY * 2}\nQuestion: Who saw it?\nAnswer:",
        {"context": STORY * 2, "question": "Who saw it?", "answer": "x"},
        "Who saw it?\nAnswer:",
    ),
    "longbench2": (
        f"Please read the text.\n<text>\n{STORY * 2}</text>\n\nWhat is the correct answer to this question: Who?\n"
        "Choices:\n(A) I\n(B) You\n\nAnswer:",
        {"context": STORY * 2, "question": "Who?", "choices": ["I", "You"], "answer": 0},
        "Who?\nChoices:\n(A) I\n(B) You\n\nAnswer:",
    ),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_the_questions_of_other_benchmarks_are_found(what):
    prompt, doc, tail = ELSEWHERE[what]
    assert find(prompt, doc).strip() == tail.strip()


REPEATED = "Who saw the ferry?"


@pytest.mark.parametrize("field", [None, "question"])
def test_words_of_the_question_inside_the_context_do_not_move_the_boundary(field):
    context = f"{STORY}{REPEATED} {STORY * 2}{REPEATED} {STORY}"
    doc = {"context": context, "question": REPEATED}
    assert find(f"Read. {context}\nQuestion: {REPEATED}\nAnswer:", doc, field) == f"{REPEATED}\nAnswer:"
    asked_otherwise = f"Read. {context}\nSay who saw it.\nAnswer:"
    if field is None:
        assert find(asked_otherwise, doc).strip() == "Say who saw it.\nAnswer:"
    else:
        with pytest.raises(UserError, match="question is not in the prompt outside its context"):
            find(asked_otherwise, doc, field)


def test_a_context_that_has_lost_its_middle_or_its_beginning_is_still_the_context():
    context = f"{STORY * 3}{REPEATED} {STORY[:90]}"
    cut = context[:120] + context[-150:]
    for left in (cut, context[-150:]):
        prompt = f"{left}\nSay who.\nAnswer:"
        assert find(prompt, {"context": context, "question": REPEATED}).strip() == "Say who.\nAnswer:"


def test_a_context_field_that_ends_with_the_question_is_split_before_it():
    prompt = f"{STORY * 2}{REPEATED}"
    assert find(f"{prompt}\nAnswer:", {"context": prompt, "question": REPEATED}) == f"{REPEATED}\nAnswer:"


def test_a_task_that_says_where_its_question_begins_is_believed():
    prompt = f"{STORY} {REPEATED} {STORY} {REPEATED} Answer:"
    doc = {"question": REPEATED, boundaries.BEGINS: prompt.index(REPEATED)}
    assert find(prompt, doc) == prompt[prompt.index(REPEATED) :]
    assert find(prompt, doc, "question") == f"{REPEATED} Answer:"


NO_CONTEXT = {
    "the whole prompt": (f"{STORY}Number:", {"input": f"{STORY}Number:"}),
    "all but a template's head": (f"<user>\n{STORY * 2}</user>", {"question": STORY * 2}),
    "all but a few words": (f"Read this. {STORY * 2} Number:", {"question": f"{STORY * 2} Number:"}),
    "a question before the context": (f"Q: who saw it?\n{STORY * 3}\nA:", {"question": "who saw it?"}),
    "a question alone": (f"Question: {STORY}\nAnswer:", {"question": STORY, "answer": "x"}),
    "an empty question before all else": (f"A note.\n{STORY * 2}", {"input": "", "context": "A note."}),
    "several fields": (STORY * 2, {"question": STORY * 2, "input": f" {STORY * 2}", "problem": STORY[5:] + STORY}),
}


@pytest.mark.parametrize("what", NO_CONTEXT)
@pytest.mark.parametrize(
    "method", [{"method": "streaming_llm", "window_size": 28}, {}], ids=["streaming_llm", "snapkv"]
)
def test_a_boundary_that_leaves_nothing_to_compress_stops_the_run_before_any_work(what, method, monkeypatch):
    prompt, doc = NO_CONTEXT[what]
    prompt = prompt.strip()
    lm = load("kvcompressed", **({**method, "question_in_prompt": False} if method else SNAPKV))
    good = Instance("x", {"question": "Number:"}, (f"{STORY * 3}Number:", None), 0, ("t", 0, 1))
    monkeypatch.setattr(lm.model, "forward", None)
    for kind, second in KINDS:
        bad = Instance(kind, doc, (prompt, second), 0, ("t", 7, 1))
        good.request_type, good.arguments = kind, (good.args[0], second)
        with pytest.raises(
            UserError, match=r"document 7 of t.*nearly no context.*\d+ of its \d+ tokens.*question_field="
        ):
            getattr(lm, kind)([good, bad], disable_tqdm=True)


def test_a_field_that_is_the_whole_prompt_gives_way_to_the_next():
    prompt = f"{STORY * 2}\nProblem: who saw the ferry?\nAnswer:"
    assert find(prompt, {"input": prompt, "problem": "who saw the ferry?"}) == "who saw the ferry?\nAnswer:"


def test_a_question_that_is_long_but_has_a_context_is_served():
    lm = load("kvcompressed", **SNAPKV)
    prompt = f"{STORY * 2}{STORY[::-1]} Number:"
    doc = {"question": STORY[::-1].strip()}
    for kind, second in KINDS:
        assert getattr(lm, kind)([Instance(kind, doc, (prompt, second), 0, ("t", 0, 1))], disable_tqdm=True)


def test_a_prompt_that_loses_its_context_to_truncation_stops_the_run():
    lm = load("kvcompressed", **SNAPKV, max_length=64, overlong="truncate_left")
    prompt, doc = f"{STORY * 4}{STORY[::-1]}", {"question": STORY[::-1].strip()}
    for kind, second in KINDS:
        with pytest.raises(UserError, match="nearly no context"):
            getattr(lm, kind)([Instance(kind, doc, (prompt, second), 0, ("t", 0, 1))], disable_tqdm=True)


def test_choices_without_a_context_are_served_beside_others():
    """lm-eval asks for them to compare with (acc_mutual_info)."""
    lm = load("kvcompressed", **SNAPKV)
    asks = [Instance("loglikelihood", {"question": "Number:"}, (c, " 4"), 0) for c in (f"{STORY * 3}Number:", "", " ")]
    assert len(lm.loglikelihood(asks, disable_tqdm=True)) == 3


@pytest.mark.parametrize("size", [1, 3])
def test_compressed_is_what_happened_before_the_question(size):
    """A context within the budget is not compressed, however much is dropped while the answer is generated."""
    lm = load(
        "kvcompressed",
        method="streaming_llm",
        n_sink=4,
        window_size=60,
        compress_every=1,
        question_in_prompt=False,
        batch_size=size,
    )
    question = f"{STORY[::-1][:150]} Number:"
    asks = [
        Instance("generate_until", {"question": question}, (f"{text}{question}", KINDS[0][1]), 0, ("t", i, 1))
        for i, text in enumerate((STORY[:120], STORY * 3))
    ]
    lm.generate_until(asks, disable_tqdm=True)
    short, long = sorted(lm.compression_log.records, key=lambda r: r.prompt_tokens)
    assert short.prompt_tokens > 64 and (short.compressed, long.compressed) == (False, True)
    assert lm.get_model_info()["kv_stats"]["compressed_share"] == 0.5


def test_questions_that_are_most_of_their_prompts_are_said(caplog):
    for n, said in ((1, True), (6, False)):
        caplog.clear()
        lm = load("kvcompressed", **SNAPKV)
        doc = {"question": STORY[::-1].strip()}
        ask = Instance("loglikelihood", doc, (f"{STORY * n}{STORY[::-1]} Number:", " 4"), 0, ("t", 0, 1))
        lm.loglikelihood([ask], disable_tqdm=True)
        lm.get_model_info()
        assert ("are over half of its prompts" in caplog.text) is said


@pytest.mark.parametrize(("question", "rest"), [("A", "\nAnswer:"), ("assist", "<|im_end|>\n<|im_start|>assistant\n")])
def test_a_question_is_not_found_inside_a_word_that_follows_it(question, rest):
    assert find(f"{STORY}\nQuestion: {question}{rest}", {"question": question}) == question + rest


def test_a_question_without_borders_of_words_is_where_it_last_stands():
    assert find(f"{STORY}\n问题什么来了答", {"question": "什么来了"}) == "什么来了答"
