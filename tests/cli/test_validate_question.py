"""kv-lm-eval validate --question: three prompts a task with the boundary marked, no model loaded."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance

from kv_lm_eval import cli, question
from kv_lm_eval.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def run(capsys, *arguments: str) -> tuple[int, str]:
    status = cli.main(["validate", "--question", *arguments])
    out = capsys.readouterr()
    return status, out.out + out.err


def test_three_prompts_with_the_boundary_marked(capsys):
    metadata = '{"lengths": [600], "depths": [50], "samples_per_cell": 4}'
    names = ("--tasks", "kv_needle_magic,kv_ruler_fwe", "--metadata", metadata)
    status, said = run(capsys, *names, "--model_args", "pretrained=kv-tiny")
    assert status == 0
    magic, fwe = said.split("== kv_needle_magic")[1].split("== kv_ruler_fwe")
    for text, words in ((magic, "Question: What is the special magic number"), (fwe, "Question: Do not provide any")):
        assert text.count(f">>> QUESTION >>>{words}") == 3
        assert text.count(" tokens, ") == 3 and text.count("% before the question") == 0
        assert all(f"document {i}: " in text for i in range(3)) and "document 3" not in text


def test_without_a_tokenizer_it_counts_characters(capsys):
    status, said = run(capsys, "--tasks", "kv_quickstart_needle")
    assert status == 0 and " characters, " in said and said.count(">>> QUESTION >>>") == 3


def test_a_prompt_without_context_says_what_a_run_would_say():
    request = Instance("generate_until", {"question": "Who saw it?"}, ("Who saw it? A:", {}), 0, ("t", 3, 1))
    with pytest.raises(UserError, match="document 3 has nearly no context before its question"):
        question._one(request, None, None)
    whole = Instance("loglikelihood_rolling", {}, ("A text.",), 0, ("t", 3, 1))
    assert question._one(whole, None, None) == "document 3: whole documents have no question"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks", "kv_ruler_qa_1", "--model_args", "pretrained=kv-tiny"], "kv_ruler_qa_1 needs squad.json"),
        ([], "--tasks"),
        (["--tasks", "kv_ruler_vt", "--metadata", "{"], "--metadata"),
        (["--tasks", "kv_ruler_vt", "--apply_chat_template"], "--apply_chat_template: name a tokenizer"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    status, text = run(capsys, *arguments)
    assert status == 2 and said in text and "Traceback" not in text
