"""The tasks ask what the official script asks: prompt, cut, template, stops; and say what they did."""

import json

import pytest
from transformers import AutoTokenizer

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.tasks.longbench_tasks import protocols
from kv_lm_eval.tasks.longbench_tasks.settings import Settings
from kv_lm_eval.tasks.longbench_tasks.specs import Spec, official, official_e
from kv_lm_eval.tasks.longbench_tasks.task import _check_lm_eval

LONG = "word " * 9000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two made rows for every dataset: a short and a long one."""
    where = tmp_path_factory.mktemp("longbench")
    for name, spec in official().items():
        for file in [name, f"{name}_e"] if name in official_e() else [name]:
            answer = {"retrieval": "Paragraph 3", "retrieval_zh": "段落3", "count": "3"}.get(spec.metric, "yes")
            rows = [
                {"input": "What?", "context": context, "answers": [answer], "length": length, "dataset": file,
                 "language": "en", "all_classes": ["yes", "no"], "_id": str(length)}
                for context, length in (("Short.", 100), (LONG, 9000))
            ]  # fmt: skip
            (where / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(where)


@pytest.fixture(scope="module")
def load(folder):
    plugin.install()
    from lm_eval.tasks import TaskManager

    def build(*names, **metadata):
        with plugin.only_our_tasks():
            index = TaskManager(metadata={"pretrained": "kv-tiny", "longbench_dir": folder, **metadata})
        tasks = index.load(list(names))["tasks"]
        return tasks[names[0]] if len(names) == 1 and names[0] in tasks else tasks

    return build


def template(messages, add_generation_prompt=True):
    """A chat template that writes its own BOS, as most do."""
    return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]" * add_generation_prompt


def prompts(task, chat=False, **kwargs):
    return [
        task.fewshot_context(doc, 0, apply_chat_template=chat, chat_template=template if chat else None, **kwargs)
        for doc in task.eval_docs
    ]


def test_groups_hold_their_datasets(load):
    assert len(load("kv_longbench")) == 21
    assert len(load("kv_longbench_e")) == 13
    assert len(load("kv_longbench_en")) == 16
    assert len(load("kv_longbench_zh")) == 7
    sizes = {"single_doc_qa": 4, "multi_doc_qa": 4, "summarization": 4, "few_shot": 4, "synthetic": 3, "code": 2}
    assert {name: len(load(f"kv_longbench_{name}")) for name in sizes} == sizes


def test_generation_is_greedy_without_stops_but_for_samsum(load):
    tasks = load("kv_longbench")
    plain = {"until": [], "do_sample": False}
    for name, spec in official().items():
        settings = tasks[f"kv_longbench_{name}"].config.generation_kwargs
        if name != "samsum":
            assert settings == {**plain, "max_gen_toks": spec.max_gen_toks}
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert tasks["kv_longbench_samsum"].config.generation_kwargs == {
        **plain, "max_gen_toks": 128, "min_new_tokens": 1, "eos_token_id": [tokenizer.eos_token_id, newline]
    }  # fmt: skip


def test_a_long_prompt_loses_its_middle_before_the_template(load):
    task = load("kv_longbench_hotpotqa")
    spec = official()["hotpotqa"]
    short, long = prompts(task)
    assert short == spec.prompt.format(context="Short.", input="What?")
    assert long.startswith(spec.prompt[:100]) and long.endswith("Question: What?\nAnswer:")
    templated = prompts(task, chat=True)
    assert templated == [f"<s>[user]{text}[assistant]" for text in (short, long)]
    scored = task.process_results(task.eval_docs[1], ["no"])
    assert scored["truncated"] == 1
    assert scored["prompt_tokens"] > 9000 and abs(scored["prompt_tokens_kept"] - 3500) < 20
    scored = task.process_results(task.eval_docs[0], ["Yes."])
    assert (scored["score"], scored["truncated"]) == (1.0, 0)
    assert scored["prompt_tokens"] == scored["prompt_tokens_kept"] < 200


def test_six_datasets_never_get_a_template(load):
    for name, spec in official().items():
        task = load(f"kv_longbench_{name}")
        same = prompts(task) == prompts(task, chat=True)
        assert same == (name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")), name
        assert task.config.metadata["longbench"]["chat_template"] == ("none" if same else "the model's")
        assert spec.chat_template != same


@pytest.fixture
def adds_bos(tmp_path):
    """A tokenizer that begins every text with <s>, as Llama's does; kv-tiny's does not."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_templates_bos_goes_where_the_tokenizer_adds_one(load, adds_bos):
    """So that there is never a double one, nor none for the other prompts of its batch."""
    task = load("kv_longbench_qasper", tokenizer=adds_bos)
    bos = task.settings.tokenizer.bos_token_id
    for text in prompts(task, chat=True):
        assert text.startswith("[user]")
        assert task.settings.tokenizer(text).input_ids.count(bos) == 1
    assert prompts(load("kv_longbench_qasper"), chat=True)[0].startswith("<s>[user]")


def test_a_system_message_is_part_of_the_template(load):
    task = load("kv_longbench_qasper")
    assert prompts(task, chat=True, system_instruction="Be brief.")[0].startswith("<s>[system]Be brief.[user]You are")


def test_length_comes_from_the_user_or_the_model(load, folder):
    asked = load("kv_longbench_qasper", longbench_max_length=500)
    prompts(asked)
    assert abs(asked.process_results(asked.eval_docs[1], [""])["prompt_tokens_kept"] - 500) < 20
    assert asked.config.metadata["longbench"]["max_length_from"] == "asked"
    assert load("kv_longbench_qasper", max_length=8192).settings.max_length == 7500
    assert load("kv_longbench_qasper", max_length=2048).settings.max_length == 2048 - 596
    with pytest.raises(UserError, match="no prompt is left"):
        load("kv_longbench_qasper", max_length=512)
    with pytest.raises(UserError, match="neither a number"):
        load("kv_longbench_qasper", longbench_max_length="long")


def test_a_long_template_makes_room_for_itself_and_the_answer(load):
    """Else the model would refuse the prompt, or cut its beginning."""
    task = load("kv_longbench_gov_report", max_length=1024)

    def long_template(messages, add_generation_prompt=True):
        return "word " * 100 + messages[0]["content"]

    text = task.fewshot_context(task.eval_docs[1], 0, apply_chat_template=True, chat_template=long_template)
    assert 400 < len(task.settings.tokenizer(text).input_ids) <= 1024 - 512
    assert text.endswith("Summary:")


def test_without_a_tokenizer_the_message_says_how_to_name_one(load):
    with pytest.raises(UserError, match="neither pretrained= nor tokenizer= names one.*longbench_max_length"):
        load("kv_longbench_qasper", pretrained=None)
    with pytest.raises(UserError, match="has none that loads"):
        load("kv_longbench_qasper", pretrained="no/such-model")
    uncut = load("kv_longbench_samsum", pretrained=None, longbench_max_length="none")
    assert len(prompts(uncut)[1]) > len(LONG)
    assert uncut.config.generation_kwargs["until"] == ["\n"]
    assert "truncated" not in uncut.process_results(uncut.eval_docs[1], ["x"])


def test_protocols(load):
    tasks = load("kv_longbench_trec", "kv_longbench_samsum", protocol="kvcache_factory")
    for task in tasks.values():
        assert task.config.generation_kwargs["min_new_tokens"] == 1
        assert "eos_token_id" not in task.config.generation_kwargs
    qasper = load("kv_longbench_qasper", protocol="kvcache_factory")
    assert prompts(qasper) == prompts(qasper, chat=True)
    assert qasper.config.metadata["longbench"]["protocol"] == "kvcache_factory"
    samsum = load("kv_longbench_samsum", protocol="snapkv")
    assert "eos_token_id" in samsum.config.generation_kwargs
    assert load("kv_longbench_trec", protocol="snapkv").config.generation_kwargs["min_new_tokens"] == 1
    mistral, snapkv = "mistralai/Mistral-7B-Instruct-v0.2", protocols.load("snapkv")
    assert not snapkv.allows_template(mistral) and snapkv.allows_template("lmsys/vicuna-7b-v1.5")
    assert snapkv.max_length(mistral) == 31500 and snapkv.max_length("meta-llama/Llama-2-7b-chat-hf") is None
    factory = protocols.load("kvcache_factory")
    assert factory.max_length("meta-llama/Meta-Llama-3-8B-Instruct") == 7500
    assert factory.wrap("meta-llama/Llama-2-7b-chat-hf") == "[INST] {prompt} [/INST]"
    with pytest.raises(UserError, match="did you mean 'snapkv'"):
        load("kv_longbench_trec", protocol="snapkb")


def test_a_chat_format_is_put_around_the_cut_prompt_of_tasks_with_templates(load):
    formatted = load("kv_longbench_qasper", longbench_chat_format="[INST]{prompt}[/INST]")
    plain = load("kv_longbench_qasper")
    assert prompts(formatted) == [f"[INST]{text}[/INST]" for text in prompts(plain)]
    assert prompts(load("kv_longbench_trec", longbench_chat_format="x{prompt}")) == prompts(load("kv_longbench_trec"))
    with pytest.raises(UserError, match="no {prompt}"):
        load("kv_longbench_qasper", longbench_chat_format="[INST]")
    with pytest.raises(UserError, match="both set"):
        prompts(formatted, chat=True)


def test_longbench_e_scores_by_length(load):
    task = load("kv_longbench_e_trec")
    rows = [task.process_results(doc, [answer]) for doc, answer in zip(task.eval_docs, ("yes", "no"), strict=True)]
    aggregation = task.aggregation()
    found = {b: aggregation[f"score_{b}"]([row[f"score_{b}"] for row in rows]) for b in ("0-4k", "8k+")}
    assert found == {"0-4k": 100.0, "8k+": 0.0}
    assert aggregation["score"]([row["score"] for row in rows]) == 50.0


def test_extra_metrics_are_off_unless_asked_for(load):
    assert set(load("kv_longbench_lcc").process_results({"row": 9, "answers": ["a"], "all_classes": None}, ["a"])) == {
        "score"
    }
    task = load("kv_longbench_lcc", longbench_extra_metrics=True)
    assert task.process_results(task.eval_docs[0], ["yes"])["extra_code_sim_levenshtein"] == 1.0
    zh = load("kv_longbench_vcsum", longbench_extra_metrics="true")
    assert zh.process_results(zh.eval_docs[0], ["yes"])["extra_rouge_score_l_zh"] == 1.0


def test_unknown_words_name_their_neighbours(load):
    with pytest.raises(UserError, match="did you mean 'longbench_dir'"):
        load("kv_longbench_trec", longbench_dri="x")
    with pytest.raises(UserError, match="did you mean 'category'"):
        Spec.from_section({"categry": "code"}, "mine")
    with pytest.raises(UserError, match="needs dataset"):
        Spec.from_section({"metric": "rouge"}, "mine")


def test_an_lm_eval_that_tells_tasks_nothing_is_named():
    with pytest.raises(UserError, match="need lm-eval 0.4.12 or later, this is 0.4.9"):
        _check_lm_eval("0.4.9")
    _check_lm_eval("0.5.0.dev1")


def test_settings_are_read_as_the_command_line_gives_them():
    settings = Settings.from_metadata({"pretrained": "kv-tiny", "longbench_max_length": "700.0", "max_length": -1.0})
    assert settings.max_length == 700


def test_a_dataset_of_ones_own_is_one_yaml(tmp_path, folder):
    plugin.install()
    from lm_eval.tasks import TaskManager

    (tmp_path / "mine.yaml").write_text(
        "class: !function kv_lm_eval.tasks.longbench_tasks.task.LongBenchTask\n"
        "task: my_task\noutput_type: generate_until\n"
        "test_split: test\nlongbench:\n  dataset: trec\n  category: mine\n  language: en\n  metric: count\n"
        '  max_gen_toks: 8\n  prompt: "{context} {input} "\n',
        encoding="utf-8",
    )
    with plugin.only_our_tasks():
        index = TaskManager(include_path=str(tmp_path), metadata={"pretrained": "kv-tiny", "longbench_dir": folder})
        task = index.load(["my_task"])["tasks"]["my_task"]
    assert prompts(task)[0] == "Short. What? "


@pytest.mark.parametrize("chat", [False, True])
def test_requests_say_where_the_question_begins(chat, load):
    """The question's words stand in the long context too, which is cut in its middle."""
    from kv_lm_eval.requests import boundaries

    tasks = load("kv_longbench", longbench_max_length=600)
    for name, task in tasks.items():
        for doc in task.eval_docs:
            doc = {**doc, "context": f"What? {doc['context']} What?", "input": "What? now"}
            prompt = task.fewshot_context(doc, 0, apply_chat_template=chat, chat_template=template if chat else None)
            request = task.construct_requests(doc, prompt, metadata=(name, 0, 1))
            if "{input}" not in task.spec.prompt:
                assert boundaries.BEGINS not in request.doc
                continue
            rest = task.spec.prompt.split("{input}")[1].strip()
            asked = prompt[request.doc[boundaries.BEGINS] :]
            assert asked.startswith("What? now") and rest in asked and asked.count("What?") == 1
            found = boundaries.find(prompt, request.doc, None, name, lambda text, start: len(text) - start)
            assert found.tail_tokens == len(asked) and not found.empty
    without = {name for name, task in tasks.items() if "{input}" not in task.spec.prompt}
    assert without == {f"kv_longbench_{n}" for n in ("gov_report", "multi_news", "vcsum", "lcc", "passage_count")}


def test_a_row_without_a_question_has_the_end_of_its_context(load):
    from kv_lm_eval.requests import boundaries

    task = load("kv_longbench_gov_report")
    doc = {**task.eval_docs[0], "input": ""}
    prompt = task.fewshot_context(doc, 0)
    request = task.construct_requests(doc, prompt, metadata=("t", 0, 1))
    found = boundaries.find(prompt, request.doc, None, "t", lambda text, start: len(text) - start)
    assert found.empty and prompt[-found.tail_tokens :] == task.spec.prompt.split("{context}")[1]
