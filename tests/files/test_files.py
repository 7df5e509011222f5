"""What is read is checked and what is written is whole."""

import json
import os
import signal
import subprocess
import sys

import pytest
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError


class Row(TypedDict):
    context: str
    answers: list[str]
    length: NotRequired[float]


def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path):
    for name, raw in {"crlf": b"\xef\xbb\xbfa\r\nb\rc", "lf": b"a\nb\nc"}.items():
        (tmp_path / name).write_bytes(raw)
        assert files.read_text(tmp_path / name) == "a\nb\nc"


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"context": null, "answers": ["x"]}', "line 2: context: .*None"),
        ('{"answers": ["x"]}', "line 2: context: field required"),
        ('{"context": "c", "answers": "abc"}', "line 2: answers: .*'abc' \\(str\\)"),
        ('{"context": "c", "answers": [1]}', "line 2: answers.0: "),
        ('{"context": "c", "answers": ["x"], "length": "7"}', "line 2: length: "),
        ('{"context": "c", "answ', "line 2: not whole JSON"),
        ("[1]", "line 2: .*dictionary"),
    ],
)
def test_a_wrong_row_is_named_by_file_line_and_field(tmp_path, line, says):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"context": "c", "answers": [], "length": 3}\n' + line + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl, {says}"):
        list(files.read_jsonl(file, Row))


@pytest.mark.parametrize("raw, says", [(b"\xff\x00\n", "not UTF-8"), (b"", "is empty"), (b"{", "not whole JSON")])
def test_damaged_files_are_one_line(tmp_path, raw, says):
    file = tmp_path / "x.json"
    file.write_bytes(raw)
    with pytest.raises(UserError, match=says) as error:
        files.read_json(file)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        files.read_text(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a folder"):
        files.read_text(tmp_path)


def test_yaml_runs_nothing(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        files.read_yaml(file)


def test_a_file_that_cannot_grow_keeps_its_old_content(tmp_path):
    file = tmp_path / "x.txt"
    files.write_whole(file, "old")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import sys; from kv_lm_eval import files\n"
        "try:\n    files.write_whole(sys.argv[1], 'x' * 5000)\n"
        "except files.UserError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True).stdout
    assert "could not be written" in out and file.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_a_killed_writer_leaves_the_old_or_the_new_content(tmp_path):
    file = tmp_path / "x.json"
    files.write_json(file, {"n": 0, "pad": "x" * 100_000})
    code = (
        "import sys; from kv_lm_eval import files\n"
        "print('ready', flush=True)\n"
        "for n in range(1, 10**6):\n    files.write_json(sys.argv[1], {'n': n, 'pad': 'x' * 100_000})"
    )
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        before = json.loads(file.read_text())["n"]
        while json.loads(file.read_text())["n"] in (0, before):
            pass
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(json.loads(file.read_text())["pad"]) == 100_000


def test_unusable_output_folders_are_found_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, a folder was expected"):
        files.check_folder(tmp_path / "file", "output_path")
    with pytest.raises(UserError, match="part of this path is a file"):
        files.check_folder(tmp_path / "file" / "under", "output_path")
    files.check_folder(tmp_path / "new" / "deep", "output_path")
    assert os.listdir(tmp_path / "new" / "deep") == []
