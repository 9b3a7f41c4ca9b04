"""The console script where PYTHONPATH hides auricle's packages behind others of the same name."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = f"import sys; sys.path.append({str(ROOT)!r}); import auricle; sys.exit(auricle.main())"
"""As an installed console script does it: auricle's folder comes after those of PYTHONPATH."""


def auricle(*python_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, python_path))}
    command = [sys.executable, "-c", SCRIPT, "--version"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", env=environment)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("launch/__init__.py", "launch"),  # as in ROS 2
        ("launch.py", "launch"),
        ("pretrain/__init__.py", "pretrain"),
        ("data_pipeline/__init__.py", "data_pipeline"),
    ],
)
def test_a_foreign_package_of_the_same_name_is_named_with_the_remedy(tmp_path: Path, file: str, name: str) -> None:
    foreign = tmp_path / "site" / file
    foreign.parent.mkdir(parents=True)
    foreign.write_text("raise SystemExit('the foreign package was run')\n")
    done = auricle(tmp_path / "site")
    assert done.returncode == 1
    assert (
        f"another package called `{name}`, {foreign if foreign.name != '__init__.py' else foreign.parent}"
        in done.stderr
    )
    assert f"Take {tmp_path / 'site'} out of PYTHONPATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_folders_that_hide_nothing_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()  # no package: a folder without __init__.py comes last
    done = auricle(tmp_path, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("auricle ")


def test_the_installed_command_is_this_script() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["scripts"] == {"auricle": "auricle:main"}
    assert "auricle*" in settings["tool"]["setuptools"]["packages"]["find"]["include"]


def test_python_runs_the_package_as_the_command() -> None:
    command = [sys.executable, "-m", "auricle", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == auricle(ROOT).stdout
    assert done.returncode == 0
