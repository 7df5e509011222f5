"""How lm-eval finds us. Each claim is checked in a fresh interpreter, because plugging in happens once a process.

The shim exists only in an installation (`make test` makes one), so its tests are skipped in a bare checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kv_lm_eval
from kv_lm_eval import cli, plugin, preflight

TASK = """\
task: {name}
dataset_path: json
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
"""


def python(code: str, *, opt_out: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KV_LM_EVAL_NO_PLUGIN": "1" if opt_out else "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def output(code: str, *, opt_out: bool = False) -> str:
    run = python(code, opt_out=opt_out)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def shim() -> None:
    if output("import sys; print('_kv_lm_eval_shim' in sys.modules)") != "True":
        pytest.skip("the start-up shim is not installed: run `make test`, or `pip install -e .`")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, plugged in and then put back as it was."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", TaskManager.__init__)
    plugin.install()


# --- the shim ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shim")
class TestShim:
    def test_interpreter_start_loads_the_shim_and_nothing_else_of_ours(self) -> None:
        ours = output("import sys; print([m for m in sys.modules if 'kv_lm_eval' in m])")
        assert ours == "['_kv_lm_eval_shim']"

    def test_model_is_registered_and_hides_no_other(self) -> None:
        code = "import lm_eval.models; from lm_eval.api.registry import model_registry as r; print(*r.keys())"
        with_us, without = output(code).split(), output(code, opt_out=True).split()
        assert [name for name in with_us if name not in without] == ["kvcompressed"]
        assert "hf" in without and set(without) <= set(with_us)

    def test_registering_imports_no_torch_and_not_our_model(self) -> None:
        code = (
            "import lm_eval, lm_eval.models, sys; print([m for m in ('torch', 'kv_lm_eval.model') if m in sys.modules])"
        )
        assert output(code) == "[]"

    def test_get_model_finds_the_class_and_still_finds_hf(self) -> None:
        code = """
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
assert get_model("hf") is HFLM
print(get_model("kvcompressed").__name__, issubclass(get_model("kvcompressed"), HFLM))
"""
        assert output(code) == "KVCompressedLM True"

    def test_our_tasks_need_no_include_path_unless_opted_out(self) -> None:
        code = """
from lm_eval.tasks import TaskManager
print(any(n.startswith("kv_") for n in TaskManager(include_defaults=False).all_tasks))
"""
        assert output(code) == "True"
        assert output(code, opt_out=True) == "False"

    def test_an_error_of_ours_is_one_line_and_lm_eval_works_on(self) -> None:
        code = """
import kv_lm_eval.plugin as plugin
plugin.MODEL_NAME = []  # unhashable: the registry raises
import lm_eval.models
from lm_eval.api.registry import model_registry
print("hf" in model_registry)
"""
        run = python(code)
        assert run.stdout.strip() == "True"
        assert len(run.stderr.splitlines()) == 1 and run.stderr.startswith("kv-lm-eval: _register_model failed")

    def test_a_plugin_that_cannot_be_imported_is_one_line_too(self) -> None:
        code = "import sys; sys.modules['kv_lm_eval'] = None; import lm_eval.models as m; print(m.__name__)"
        run = python(code)
        assert run.stdout.strip() == "lm_eval.models"
        assert len(run.stderr.splitlines()) == 1 and run.stderr.startswith("kv-lm-eval: not plugged into lm-eval")

    @pytest.mark.parametrize(
        "launcher", ["lm_eval", pytest.param("accelerate.commands.launch --cpu -m lm_eval", marks=pytest.mark.slow)]
    )
    def test_lm_eval_as_a_module_knows_our_tasks(self, launcher: str, tmp_path: Path) -> None:
        command = [sys.executable, "-m", *launcher.split(), "validate", "--tasks", "kv_quickstart_needle"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert "All tasks found and valid" in run.stdout, run.stderr


# --- tasks: lm-eval's own < ours < the user's --------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
class TestTasks:
    def test_installing_twice_wraps_once(self) -> None:
        from lm_eval.tasks import TaskManager

        once = TaskManager.__init__
        plugin.install()
        assert TaskManager.__init__ is once

    def test_fast_index_sees_only_ours(self) -> None:
        from lm_eval.tasks import TaskManager

        with plugin.only_our_tasks():
            names = TaskManager().all_tasks
        assert names and all(name.startswith(plugin.TASK_PREFIX) for name in names)

    def test_every_member_of_our_groups_is_ours(self) -> None:
        """Else the fast index, which knows no other tasks, could not load the group."""
        from lm_eval.tasks import TaskManager

        with plugin.only_our_tasks():
            manager = TaskManager()
        for group in manager.all_groups:
            loaded = manager.task_index[group].cfg["task"]
            members = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in loaded]
            assert set(members) <= set(manager.all_tasks), group

    def test_a_users_include_path_wins(self, tmp_path: Path) -> None:
        from lm_eval.tasks import TaskManager

        with plugin.only_our_tasks():
            name = TaskManager().all_subtasks[0]
            (tmp_path / "mine.yaml").write_text(TASK.format(name=name))
            for include_path in (str(tmp_path), tmp_path, [tmp_path]):
                manager = TaskManager(include_path=include_path)
                assert manager.task_index[name].yaml_path == tmp_path / "mine.yaml"
                assert manager.include_path == include_path

    def test_owns_tasks_only_when_all_are_ours(self) -> None:
        from lm_eval.tasks import TaskManager

        with plugin.only_our_tasks():
            name = TaskManager().all_tasks[0]
        assert plugin.owns_tasks([name]) and plugin.owns_tasks([name, "kv_*"])
        assert not plugin.owns_tasks([name, "hellaswag"])
        assert not plugin.owns_tasks([name, "kv_no_such_task"])
        assert not plugin.owns_tasks([])


# --- a later lm-eval, with discovery of its own ------------------------------------------------------------------


@pytest.mark.parametrize("installed_as_package", [True, False])
def test_leaves_the_model_to_a_host_that_finds_it(monkeypatch: pytest.MonkeyPatch, installed_as_package: bool) -> None:
    from lm_eval.api import registry

    monkeypatch.setattr(registry, "load_plugins", lambda: None, raising=False)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ["ours"] if installed_as_package else [])
    monkeypatch.setattr(registry, "model_registry", registry.Registry("model"))
    plugin._register_model()
    assert (plugin.MODEL_NAME in registry.model_registry) is not installed_as_package


def test_adds_only_the_folders_that_the_host_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import manager

    first, *others = plugin.task_folders()
    seen: list[list[str]] = []

    def record(self: object, include_path: list[str] | None = None, include_defaults: bool = True) -> None:
        seen.append(include_path or [])

    monkeypatch.setattr(manager.TaskManager, "__init__", record)
    monkeypatch.setattr(manager, "discover_plugin_task_paths", lambda: [first], raising=False)
    plugin._wrap_task_manager()
    manager.TaskManager(include_path=["theirs"])
    assert seen == [[*map(str, others), "theirs"]]


# --- the kv-lm-eval command --------------------------------------------------------------------------------------


def test_ls_lists_our_tasks_only(capsys: pytest.CaptureFixture[str], installed: None) -> None:
    assert cli.main(["ls", "subtasks"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert rows and all(row.startswith("|kv_") for row in rows)


def test_a_users_mistake_is_a_message_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(asked: dict[str, object]) -> None:
        raise kv_lm_eval.UserError("window_size=64 is too large;\nlower it")

    monkeypatch.setattr(preflight, "check", refuse)
    assert cli.main(["run", "--tasks", "kv_x"]) == 2
    assert capsys.readouterr().err == "\nkv-lm-eval stopped: window_size=64 is too large;\n  lower it\n"


def test_config_file_names_the_tasks(tmp_path: Path, installed: None) -> None:
    import argparse

    config = tmp_path / "run.yaml"
    config.write_text("tasks: [kv_quickstart_needle]\n")

    def small(**arguments: object) -> bool:
        return preflight.small_index_will_do(preflight.asked_for(argparse.Namespace(command="run", **arguments)))

    assert small(config=str(config))
    assert not small(config=str(config), tasks=["hellaswag"])
    assert not small(config=str(config), include_path="mine")


def test_help_needs_no_lm_eval() -> None:
    code = "import sys; from kv_lm_eval.cli import main; main(['--help']); print('lm_eval' in sys.modules)"
    assert output(code).splitlines()[-1] == "False"


def test_a_reader_who_has_enough_ends_the_list_quietly() -> None:
    command = [sys.executable, "-m", "kv_lm_eval", "methods", "snapkv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        said = run.stderr.read()
    assert (run.returncode, said) == (0, "")
