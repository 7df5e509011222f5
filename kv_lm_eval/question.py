"""`kv-lm-eval validate --tasks X --question`: where question_in_prompt=False finds the question, seen on three prompts.

Nothing is run and no weights are loaded; with pretrained= or tokenizer= in --model_args lengths are in its tokens.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kv_lm_eval import console, files, harness, presets, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries

PROMPTS = 3
AROUND = 160  # characters shown before the boundary, and most of the tail
USAGE = """\
Shows where the question begins in the first prompts of each task: what stands before the mark would be compressed with
question_in_prompt=False, what stands after it is fed over the compressed cache.
"""


def main(argv: Sequence[str]) -> int:
    return console.command("kv-lm-eval", lambda: _main(argv), lists=True)


def _main(argv: Sequence[str]) -> int:
    parser = console.Parser(prog="kv-lm-eval validate", description=USAGE)
    parser.add_argument("--question", action="store_true", required=True)
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    parser.add_argument("--model_args", default="", help="as of `run`; pretrained= or tokenizer= names the tokenizer")
    parser.add_argument("--metadata", default="{}", help="as of `run`")
    parser.add_argument("--include_path", help="as of `run`")
    parser.add_argument("--apply_chat_template", action="store_true", help="as of `run`")
    args = parser.parse_args(list(argv))
    metadata = files.check(files.parse_json(args.metadata, "--metadata"), dict[str, Any], "--metadata")
    names = [name for name in args.tasks.split(",") if name.strip()]
    for text in pages(names, _arguments(args.model_args), metadata, args.include_path, args.apply_chat_template):
        print(text)
    return 0


def _arguments(text: str) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(text)


def pages(
    names: Sequence[str],
    model_args: dict[str, Any],
    metadata: dict[str, Any],
    include_path: str | None = None,
    apply_chat_template: bool = False,
) -> Iterator[str]:
    """A text for each task: its first prompts with their boundary."""
    tokenizer = _tokenizer(model_args)
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("--apply_chat_template: name a tokenizer that has one by tokenizer=NAME in --model_args")
    field = {**presets.of(model_args)[0], **model_args}.get("question_field")
    with harness.task_manager(names, include_path, {**model_args, **metadata}) as manager:
        harness.check_tasks(names, manager)
        tasks = manager.load(list(names))["tasks"]
    for name, task in tasks.items():
        task.build_all_requests(
            limit=PROMPTS,
            apply_chat_template=apply_chat_template,
            chat_template=_template(tokenizer) if apply_chat_template else None,
        )
        firsts = {request.doc_id: request for request in reversed(task.instances)}
        found = [_one(firsts[doc_id], field, tokenizer) for doc_id in sorted(firsts)[:PROMPTS]]
        yield "\n\n".join([f"== {name}", *found])


def _one(request: Any, field: str | None, tokenizer: Any) -> str:
    prompt, called = request.args[0], f"document {request.doc_id}"
    if not isinstance(prompt, str) or not prompt or request.request_type == "loglikelihood_rolling":
        return f"{called}: whole documents have no question"
    (boundary,) = boundaries.find_all([request], field, _characters_from, lambda _: called, list)
    assert boundary is not None
    begins = max(0, len(prompt.rstrip() if request.request_type == "loglikelihood" else prompt) - boundary.tail_tokens)
    head, tail = prompt[:begins], prompt[begins:]
    counts, unit = _counts(head, tail, tokenizer)
    share = counts[0] / max(1, sum(counts))
    said = f"{called}: {sum(counts):,} {unit}, {counts[0]:,} of them ({share:.1%}) before the question"
    if not boundaries.leaves_context(sum(counts), counts[1]):
        said += f"; a run would stop, at least {boundaries.LEAST_CONTEXT:.0%} must be"
    said += "; no question of its own" * boundary.empty
    before = ("..." if len(head) > AROUND else "") + head[-AROUND:]
    after = tail if len(tail) <= 4 * AROUND else f"{tail[: 2 * AROUND]} [...] {tail[-AROUND:]}"
    return "\n".join([said, textwrap.indent(f"{before}>>> QUESTION >>>{after}", "    ", lambda line: True)])


def _characters_from(text: str, start: int) -> int:
    return len(text) - start


def _counts(head: str, tail: str, tokenizer: Any) -> tuple[tuple[int, int], str]:
    """Of what stands before the question and from it on, in tokens where there is a tokenizer."""
    if tokenizer is None:
        return (len(head), len(tail)), "characters"
    whole, before = (len(tokenizer(text, verbose=False).input_ids) for text in (head + tail, head))
    return (before, max(0, whole - before)), "tokens"


def _tokenizer(model_args: dict[str, Any]) -> Any:
    name = model_args.get("tokenizer") or model_args.get("pretrained")
    if not isinstance(name, str):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tiny.resolve(name))
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer {name} could not be loaded: {str(error).splitlines()[0]}") from None


def _template(tokenizer: Any) -> Callable[..., str]:
    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return template
