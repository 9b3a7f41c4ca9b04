"""The installed wheel works outside the checkout: raw audio to an exported encoder, in an environment of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from launch.demo_corpus import synthesise
from tests.support.paths import ROOT
from tests.support.requirements import closure, extras, requirements, top_level

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
    """Installs the wheel into a new environment with links to the packages that it requires, and to no others."""
    home = wheel.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=60)
    [packages] = home.glob("lib/python*/site-packages")
    here = Path(sysconfig.get_path("purelib"))
    for name in top_level(closure(requirements())):
        if (here / name).exists():
            (packages / name).symlink_to(here / name)
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
    run(command, outside, "export", made, "torchscript", "--to", "torchscript")
    card = (outside / "torchscript" / "README.md").read_text()
    assert f"auricle {version}, commit not recorded" in card, "there is no repository here"
    for form, package in (("hugging_face", "transformers"), ("onnx", "onnx onnxscript onnxruntime")):
        assert f"pip install {package}" in run(command, outside, "export", made, form, "--to", form, code=2)
        assert not (outside / form).exists()
    assert json.loads((outside / made / "environment.json").read_text())["version"] == version


@pytest.mark.slow
def test_a_batch_job_runs_the_installed_package(command: Path, outside: Path) -> None:
    dry = ["launcher=slurm", "launcher.nodes=2", "--dry-run"]
    said = run(command, outside, "pretrain", "+experiment=wav2vec2_tiny", "data.shards=shards", *dry)
    assert str(command.parent) in said
    assert str(ROOT) not in said


BROUGHT = {
    "annotated_types": "pydantic", "braceexpand": "webdataset", "faiss": "faiss-cpu", "google": "tensorboard",
    "omegaconf": "hydra-core", "polars": "fastabx", "pydantic_core": "pydantic",
}  # fmt: skip
"""Module that is imported -> the package that brings it."""
ELSEWHERE = {"flwr"}
"""Modules of environments of their own: Flower's pins exclude the tested packages."""


def test_every_imported_package_is_declared() -> None:
    """By the project or by an extra; that the required ones are enough is tested by the chain above."""
    own = {"auricle", "conf", "data_pipeline", "launch", "pretrain"}
    imported = set[str]()
    for package in own - {"conf"}:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                imported.update(name.partition(".")[0] for name in names)
    packages, declared = metadata.packages_distributions(), {canonicalize_name(r.name) for r in requirements(*extras())}
    for module in imported - own - sys.stdlib_module_names - ELSEWHERE:
        of_module = {canonicalize_name(name) for name in packages.get(module, [module])}
        assert of_module & declared or BROUGHT.get(module) in declared, module


def test_every_extra_is_in_the_documents() -> None:
    listed = (ROOT / "docs" / "getting_started.md").read_text()
    assert [name for name in [*extras(), "dev"] if f"`{name}`" not in listed] == []


def test_no_message_installs_this_package_from_an_index() -> None:
    """No index has a distribution of this name, so `pip install auricle` would install something else."""
    for package in ("auricle", "data_pipeline", "launch", "pretrain"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"auricle\[|pip install [^\n]*\bauricle\b", text), file
