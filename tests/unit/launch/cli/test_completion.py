"""Completion scripts for bash and zsh: every command, choice and field, without slow imports."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.core.schema import document
from launch import main
from launch.cli import completion
from launch.cli.command_table import COMMANDS, SUBCOMMANDS
from launch.cli.compose import compose
from launch.cli.groups import groups
from launch.config import EvaluateJob, PreprocessJob, PretrainJob, TargetsJob
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def after() -> dict[str, list[str]]:
    return completion.words(COMMANDS, groups())


@pytest.mark.parametrize(
    ("command", "kind", "choices"),
    [
        ("pretrain", PretrainJob, ["objective=best_rq", "frontend=log_mel", "launcher=slurm"]),
        ("pretrain", PretrainJob, ["objective=wav2vec2", "encoder=conformer", "launcher=ray"]),
        ("preprocess", PreprocessJob, ["corpus=manifest"]),
        ("targets", TargetsJob, []),
        ("evaluate", EvaluateJob, []),
    ],
)
def test_every_field_is_completed(after: dict[str, list[str]], command: str, kind: type, choices: list[str]) -> None:
    """Field names parsed from the source equal those of the imported classes."""
    rows = {f"{row.path}=" for row in document(kind, "", compose(command, choices))}
    assert rows - set(after[command]) == set()


def test_every_choice_and_command_is_completed(after: dict[str, list[str]]) -> None:
    assert after.keys() == COMMANDS.keys()
    assert {"objective=hubert", "+experiment=best_rq_tiny", "launcher=slurm", "--cfg"} <= set(after["pretrain"])
    assert "objective=hubert" not in after["preprocess"]
    for command, subcommands in SUBCOMMANDS.items():
        assert set(subcommands) <= set(after[command])
    assert {"requeue", "index"} <= {*after["jobs"], *after["shards"]}


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_the_table_of_subcommands_equals_those_of_the_commands(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # raised by argparse
        assert main.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in SUBCOMMANDS[command] if name not in shown] == []
    assert main.main([command, "no-such-subcommand"]) == 2


def test_the_script_needs_neither_torch_nor_hydra() -> None:
    code = (
        "import sys, launch.main; launch.main.main(['completion', 'zsh']); "
        "print({'torch', 'hydra', 'ray', 'pydantic'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.strip().splitlines()[-1] in ("set()", "{'pydantic'}")
    assert done.stdout.startswith("#compdef auricle")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("auricle pretr", "pretrain"),
        ("auricle pretrain objective=hub", "hubert"),
        ("auricle pretrain launcher=", "local"),
        ("auricle pretrain encoder.la", "encoder.layer_drop="),
        ("auricle jobs req", "requeue"),
        ("auricle shards ind", "index"),
        ("auricle pretrain +exp", f"+experiment={groups()['experiment'][0]}"),
        ("auricle pretrain data.shards=one", "one shard"),
    ],
)
def test_bash_completes(after: dict[str, list[str]], tmp_path: Path, line: str, first: str) -> None:
    (tmp_path / "script").write_text(completion.script("bash", after))
    (tmp_path / "one shard").mkdir()
    program = (
        "source ./script; COMP_LINE=$LINE; COMP_POINT=${#LINE}; COMP_WORDS=($LINE); "
        'COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _auricle; printf "%s" "${COMPREPLY[0]}"'
    )
    done = subprocess.run(
        ["bash", "-uc", program], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"LINE": line}
    )
    assert done.stdout == first, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_valid(after: dict[str, list[str]], tmp_path: Path, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(completion.script(shell, after))
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], check=False).returncode == 0


def test_an_unsupported_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["completion", "fish"]) == 2
    assert "bash" in capsys.readouterr().err
