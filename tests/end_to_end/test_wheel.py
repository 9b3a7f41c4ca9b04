"""The installed wheel works outside the checkout: raw audio to an exported encoder, in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from launch.demo_corpus import synthesise
from tests.support.paths import ROOT

SOURCES = ("auricle", "conf", "data_pipeline", "launch", "pretrain", "slurm")
FILES = ("pyproject.toml", "README.md", "LICENSE")
SMALL = (
    *("launcher.processes=1", "train.steps=3", "train.checkpoint_every=3", "data.batch_seconds=64"),
    *("encoder.layers=1", "encoder.dim=32", "encoder.heads=2", "encoder.ffn_dim=64", "health.on_collapse=warn"),
)


def built(folder: Path) -> Path:
    """Builds the wheel of a copy of the sources, so that nothing is written to the checkout."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source" / name)
    line = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*line, "--wheel-dir", folder, folder / "source"], check=True, timeout=200, cwd=folder)
    return next(folder.glob("auricle-*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def command(wheel: Path) -> Path:
    """Installs the wheel alone into a new environment, which finds the other packages where this one has them."""
    home = wheel.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=60)
    [packages] = home.glob("lib/python*/site-packages")
    # a folder in a .pth file is searched, but its own .pth files, as that of an editable auricle, are not read
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-qq", "--no-deps"]
    subprocess.run([*install, "--no-index", "--ignore-installed", wheel], check=True, timeout=60)
    return home / "bin" / "auricle"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with speech-like audio and its manifest."""
    home = tmp_path_factory.mktemp("outside")
    synthesise(home / "speech", 24)
    rows = ["path\tspeaker\ttext\tlabel\tlanguage\tcorpus\tsplit"]
    for number, file in enumerate(sorted((home / "speech").glob("*.flac"))):
        split = ("train", "valid", "test")[number // 2 % 3]
        rows.append(f"speech/{file.name}\t{file.name[:7]}\tyes\tab{number % 2}\ten\tmade\t{split}")
    (home / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return home


def run(command: Path, home: Path, *arguments: str, code: int = 0) -> str:
    """Runs the installed command in `home`; returns its whole output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    line = [str(command), *arguments]
    done = subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True, timeout=250)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    assert not re.search(r"make setup|auricle\[|pip install .*\bauricle\b", said), (
        "remedies name what works outside the checkout"
    )
    return said


def test_the_wheel_contains_everything_that_commands_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {name for name in tracked.stdout.split() if not name.startswith("launch/setup/")}
    assert listed - names == set()
    assert {f"{package}/py.typed" for package in ("auricle", "data_pipeline", "launch", "pretrain")} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_chain_runs_outside_the_checkout(command: Path, outside: Path) -> None:
    where = "import auricle, conf, launch; print(auricle.__file__, launch.__file__)"
    python = command.parent / "python"
    found = subprocess.run([python, "-c", where], cwd=outside, capture_output=True, text=True, check=True, env={})
    assert str(ROOT) not in found.stdout
    assert "all requirements are met" in run(command, outside, "doctor")
    run(command, outside, "preprocess", "corpus.path=speech", "out=shards", "ray.num_cpus=2")
    run(command, outside, "targets", "shards=shards", "out=labels", "classes=8", "ray.num_cpus=2")
    labels = ["data.targets.mfcc=labels", "objective.labels=mfcc", "objective.units=8", "objective.label_rate_hz=100"]
    train = ["+experiment=hubert_conv_tiny", "data.shards=shards", *labels, "objective.relabel_step=0", *SMALL]
    assert "auricle board" in run(command, outside, "pretrain", *train)
    made = "runs/hubert_conv_tiny"
    said = run(command, outside, "evaluate", f"checkpoint={made}", "task=keywords", "manifest=manifest.tsv",
               "corpora=made", "baselines=false")  # fmt: skip
    assert "accuracy" in said
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for form in ("hugging_face", "torchscript"):
        run(command, outside, "export", made, form, "--to", form)
        card = (outside / form / "README.md").read_text()
        assert f"auricle {version}, commit not recorded" in card, "there is no repository here"
        assert "not recorded" in card
    assert json.loads((outside / made / "environment.json").read_text())["version"] == version


@pytest.mark.slow
def test_a_batch_job_runs_the_installed_package(command: Path, outside: Path) -> None:
    dry = ["launcher=slurm", "launcher.nodes=2", "--dry-run"]
    said = run(command, outside, "pretrain", "+experiment=wav2vec2_tiny", "data.shards=shards", *dry)
    assert str(command.parent) in said
    assert str(ROOT) not in said


def test_no_message_installs_this_package_from_an_index() -> None:
    """No index has a distribution of this name, so `pip install auricle` would install something else."""
    for package in ("auricle", "data_pipeline", "launch", "pretrain"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"auricle\[|pip install [^\n]*\bauricle\b", text), file
