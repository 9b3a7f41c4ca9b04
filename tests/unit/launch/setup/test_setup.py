"""The environment: wheels repacked by setup.sh and versions pinned in constraints.txt."""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from launch.setup.repack_torchaudio import repack
from tests.support.paths import ROOT

PACKAGES = ("auricle", "data_pipeline", "launch", "pretrain")


def test_repack_drops_the_libraries_and_stays_a_valid_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "torchaudio-2.0.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("torchaudio/__init__.py", "x = 1\n")
        file.writestr("torchaudio/lib/a.so", b"\0")
        file.writestr("torchaudio-2.0.0.dist-info/METADATA", "Name: torchaudio\nVersion: 2.0.0\n\nVersion: 2.0.0\n")
        file.writestr("torchaudio-2.0.0.dist-info/RECORD", "torchaudio/lib/a.so,,\n")
    made = repack(wheel, tmp_path / "out")
    assert made.name == "torchaudio-2.0.0+cpu-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(made) as file:
        names = file.namelist()
        assert not [name for name in names if name.endswith(".so")]
        lines = file.read("torchaudio-2.0.0+cpu.dist-info/METADATA").decode().splitlines()
        assert lines == ["Name: torchaudio", "Version: 2.0.0+cpu", "", "Version: 2.0.0"]
        for line in file.read("torchaudio-2.0.0+cpu.dist-info/RECORD").decode().split():
            name, digest, size = line.rsplit(",", 2)
            if digest:
                data = file.read(name)
                wanted = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={wanted}", len(data))


def test_every_dependency_is_pinned_and_within_its_range() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    normal = {re.sub("[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(line for extra in extras.values() for line in extra)]:
        name = re.match(r"[\w.-]+", requirement)
        assert name
        if name[0] == "auricle":  # an extra that refers to other extras
            continue
        assert re.sub("[-_.]+", "-", name[0]).lower() in normal, f"{requirement} has no pin"
    assert not [pin for pin in pins.values() if "+" in pin], "local versions exist on this machine only"
    assert metadata.version("torch").split("+")[0] == normal["torch"]


PART_OF = {
    "annotated_types": "pydantic",
    "google": "tensorboard",
    "omegaconf": "hydra-core",
    "pydantic_core": "pydantic",
}
"""Modules that a dependency brings, by that dependency."""
OPTIONAL = {("launch/serving/server.py", "aiohttp")}
"""Modules of an extra, which commands import late."""


def test_what_the_shipped_packages_import_is_installed_with_them() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = {re.split(r"[^\w.-]", line)[0].lower() for line in lines}
    owners, lacking = metadata.packages_distributions(), set()
    for file in [f for name in PACKAGES for f in (ROOT / name).rglob("*.py")]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {module.partition(".")[0] for module in modules} - {
                *PACKAGES,
                "conf",
                *sys.stdlib_module_names,
            }:
                named = {PART_OF[module]} if module in PART_OF else {name.lower() for name in owners.get(module, ())}
                if not named & required:
                    lacking.add((str(file.relative_to(ROOT)), module))
    assert lacking == OPTIONAL
    assert "torchaudio" in required


def set_up(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.sh in a copy, with a program in place of Python."""
    copy = tmp_path / "copy"
    (copy / "launch" / "setup").mkdir(parents=True)
    for file in ("pyproject.toml", "constraints.txt", "launch/setup/setup.sh", "launch/setup/repack_torchaudio.py"):
        (copy / file).write_bytes((ROOT / file).read_bytes())
    program = tmp_path / "python3.9"
    program.write_text(python)
    program.chmod(0o755)
    command = ["bash", str(copy / "launch" / "setup" / "setup.sh")]
    environment = os.environ | {"PYTHON": str(program)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


FAKE = """#!/bin/sh
[ "$1" = --version ] && echo "Python 3.11.0"
[ "$2" = venv ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\\nexit 0\\n' > .venv/bin/python
printf '#!/bin/sh\\necho "Collecting all"\\n[ -z "$PIP_FAILS" ]\\n' > .venv/bin/pip
chmod +x .venv/bin/python .venv/bin/pip
"""


def test_setup_says_which_step_it_is_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = set_up(tmp_path, FAKE)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line[:3] for line in said[1:-1]] == ["1/4", "2/4", "3/4", "4/4"]
    assert said[-1] == "ready: .venv/bin/auricle --help"
    monkeypatch.setenv("PIP_FAILS", "1")
    failed = set_up(tmp_path / "again", FAKE)
    assert failed.returncode != 0
    assert "ready" not in failed.stdout


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    done = set_up(tmp_path, "#!/bin/sh\nexit 1\n")
    old = tmp_path / "python3.9"
    assert done.returncode == 1
    assert "needs Python 3.11 or newer; tried: " + str(old) in done.stderr
