"""`auricle COMMAND --help`: fast, without torch, grouped, and with the fields of this command alone."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys

import pytest

from launch import main
from launch.cli.command_table import COMMANDS
from launch.cli.tables import PIPED_WIDTH
from pretrain import registry
from tests.support.paths import ROOT

CODE = """
import sys
from launch.main import main
for command in sys.argv[1:]:
    print(f"== {command}")
    try:
        code = main([command, "--help"])
    except SystemExit as ended:  # of argparse
        code = ended.code
    assert code == 0, command
    assert not {"torch", "ray", "deepspeed", "transformers"} & set(sys.modules), command
"""


def help_of(*commands: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    line = [sys.executable, "-c", CODE, *commands]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, env=environment)


def test_help_of_every_command_is_printed_without_torch() -> None:
    done = help_of(*COMMANDS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "help says nothing about work that it does not do"
    shown = done.stdout.split("== ")[1:]
    for command, text in zip(COMMANDS, shown, strict=True):
        first = text.splitlines()[1]
        assert first.startswith((f"auricle {command}", f"usage: auricle {command}")), command


def test_help_of_commands_that_train_lists_the_fields_of_training() -> None:
    for text in help_of("plan-run", "data", "demo", "bands").stdout.split("== ")[1:]:
        assert "Fields and choices of `auricle pretrain`" in text
        assert "objective=" in text
        assert "  optimizer.lr  = " in text


def test_the_longest_help_takes_about_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert help_of("pretrain").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 2, "0.8 s on an idle machine; importing torch takes 2 s more"


FIELDS = """
import sys
from data_pipeline.core.schema import document
from pretrain import registry
named = [(kind, name) for kind in registry.PACKAGES for name in registry.names(kind)]
shown = {plugin: list(document(registry.documented_type(*plugin))) for plugin in named}
assert "torch" not in sys.modules
for plugin, rows in shown.items():
    assert rows and rows == list(document(registry.config_type(*plugin))), plugin
print(len(shown))
"""


def test_help_documents_the_fields_of_a_plug_in_as_its_module_defines_them() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a process that has not imported the modules
    line = [sys.executable, "-c", FIELDS]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(len(registry.names(kind)) for kind in registry.PACKAGES)


def test_help_of_a_command_groups_its_own_fields() -> None:
    lines = help_of("evaluate").stdout.splitlines()
    assert any(line == "launcher" for line in lines), "a title for each group of fields"
    assert not any(line.strip().startswith(("optimizer.", "encoder.", "data.")) for line in lines)


def test_piped_help_has_a_fixed_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for columns in ("40", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main.main(["tokens", "--help"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert 80 < max(map(len, shown[0].splitlines())) <= PIPED_WIDTH


@pytest.mark.parametrize("asked", [["--help"], ["export", "--help"]])
def test_piped_help_has_the_same_lines_whatever_columns_says(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = set()
    for number in ("40", "300"):
        monkeypatch.setenv("COLUMNS", number)
        with contextlib.suppress(SystemExit):
            main.main(asked)
        found.add(capsys.readouterr().out)
    (text,) = found
    assert 80 < max(map(len, text.splitlines())) <= 100
