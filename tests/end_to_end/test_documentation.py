"""Commands of the documentation, without running them.

Of a command with a configuration, the overrides are composed and validated; of any other, the subcommand and options
must be in its help text. test_readme.py runs the README's first run, the Python examples and the quick commands,
test_documented_commands.py those that take seconds; tests/support/documented_commands.py names the rest with a reason.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import io
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest

from data_pipeline.core import plugins
from data_pipeline.text.artefact import TokensConfig
from launch.cli.command_table import SUBCOMMANDS
from launch.cli.outside import RECIPES, take_outside
from launch.cli.request import read
from launch.commands import finetune
from launch.config import EvaluateJob, FinetuneJob, PreprocessJob, PretrainJob, TargetsJob
from launch.main import main
from launch.serving.config import ServeConfig
from launch.workflows import pipeline
from pretrain.federated.config import DeviceConfig
from pretrain.generation.config import SpeakConfig
from pretrain.recognition.config import TranscribeConfig
from pretrain.retrieval.config import EmbedConfig, SearchConfig
from tests.support.documented_commands import COMPOSED, RUNS, Run, run_of
from tests.support.documents import PAGES, commands, write_plugins
from tests.support.paths import ROOT

CONFIGS = {
    "preprocess": PreprocessJob,
    "targets": TargetsJob,
    "tokens": TokensConfig,
    "pretrain": PretrainJob,
    "evaluate": EvaluateJob,
    "finetune": FinetuneJob,
    "device": DeviceConfig,
    "speak": SpeakConfig,
    "transcribe": TranscribeConfig,
    "embed": EmbedConfig,
    "search": SearchConfig,
    "serve": ServeConfig,
}
"""Commands with a composed configuration."""
LIKE_PRETRAIN = {"plan-run": ("cluster", "mfu", "devices"), "data": (), "bands": ("seeds", "out")}
"""Commands that take the overrides of `pretrain` beside fields of their own."""
SHOWN = {shlex.join(line): line for page in PAGES for line in commands(page)}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with the documented plug-in and recipe, for the folders /my/… of the documentation."""
    for name in (plugins.VARIABLE, RECIPES):
        monkeypatch.setenv(name, "")  # restored after the test
    write_plugins(tmp_path)
    return tmp_path


def test_the_configuration_reference_has_every_command() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "hooks" / "pages.py"))
    assert page["COMMANDS"] == CONFIGS | {"pipeline": pipeline.PipelineConfig}


@pytest.mark.parametrize("shown", SHOWN)
def test_a_documented_command_is_valid(shown: str, own: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.tsv").touch()
    words = [
        word.replace("MANIFEST", str(tmp_path / "manifest.tsv")).replace("=/my/", f"={own}/") for word in SHOWN[shown]
    ]
    command, *given = take_outside(words)
    overrides = [argument for argument in given if not argument.startswith("-")]
    options = [argument for argument in given if argument.startswith("-")]
    if command in CONFIGS and "--help" not in given:
        if "--multirun" in given:
            overrides = [line.partition(",")[0] for line in overrides]
        if command == "finetune":
            overrides, training = finetune.split(overrides)
            assert read("pretrain", PretrainJob, [*training, "data.shards=none"]) is not None
        assert read(command, CONFIGS[command], overrides) is not None
    elif command == "pipeline":
        mine, steps, launcher = pipeline.split(overrides)
        request = read("pipeline", pipeline.PipelineConfig, mine)
        assert request is not None
        assert pipeline.steps(request.config, steps, launcher)
    elif command in LIKE_PRETRAIN:
        overrides = overrides[1:] if command == "data" else overrides
        fields = [line for line in overrides if line.partition("=")[0] not in LIKE_PRETRAIN[command]]
        assert read("pretrain", PretrainJob, [*fields, "data.shards=none"]) is not None
    elif command not in CONFIGS:
        words = given[:1] if command in SUBCOMMANDS else []
        listed = usage(command, *words)
        assert all(option in listed for option in options), options


@functools.cache
def usage(*words: str) -> str:
    """Returns the help text of a command without a composed configuration."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        assert main([*words, "--help"]) == 0
    return printed.getvalue()


@pytest.mark.parametrize("shown", SHOWN)
def test_a_documented_command_is_run_or_named_with_a_reason(shown: str) -> None:
    run_of(shown)


def test_no_pattern_of_documented_commands_is_left_over() -> None:
    used = {run.pattern for run in map(run_of, SHOWN) if run is not None}
    assert [run.pattern for run in RUNS if isinstance(run, Run) and run.pattern not in used] == []
    assert [p for p in COMPOSED if not any(fnmatch.fnmatchcase(shown, p) for shown in SHOWN)] == []


def test_the_documentation_shows_commands_of_every_kind() -> None:
    assert len(SHOWN) > 30
    assert {"preprocess", "pretrain", "evaluate", "export", "jobs", "pipeline"} <= {line[0] for line in SHOWN.values()}


def test_the_site_lists_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert [name for name in pages if f": {name}\n" not in navigation] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_documentation_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:data_pipeline|pretrain|launch|conf|slurm|tests|benchmarks|docs)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


def test_programs_named_in_benchmark_results_exist() -> None:
    results = [page for page in (ROOT / "benchmarks" / "results").iterdir() if page.suffix in (".md", ".txt")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in results)
    programs = {name.replace(".", "/") + ".py" for name in re.findall(r"python -m (benchmarks[\w.]+)", text)}
    programs |= set(re.findall(r"(?:benchmarks|tests)/[\w/]+\.py", text))
    assert len(programs) > 10
    assert [name for name in programs if not (ROOT / name).exists()] == []


def test_the_layers_of_architecture_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == "layers")
    block = re.search(r"\n\n    (auricle →.*?)\n\n", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    shown, package = [], ""
    for group in block[1].split("→"):
        names = [name.strip() for name in group.split("|")]
        package = names[0].partition(".")[0] if "." in names[0] else package
        shown.append({f"{package}.{name}" if package and "." not in name else name for name in names})
    assert shown == [{name.strip() for name in layer.split("|")} for layer in layers]


def test_every_module_has_a_layer() -> None:
    """import-linter's `exhaustive` works within one package; these layers go through three."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["name"] == "layers")
    listed = sorted(name.strip() for layer in layers for name in layer.split("|"))
    packages = [package for package in settings["root_packages"] if package not in listed]  # others are one layer
    files = [file for package in packages for file in (ROOT / package).glob("*.py")]
    files += [file.parent for package in packages for file in (ROOT / package).glob("*/__init__.py")]
    modules = {f"{file.parent.name}.{file.stem}" for file in files if file.stem != "__init__"}
    assert listed == sorted(modules | (set(settings["root_packages"]) - set(packages)))


def test_the_parity_table_has_every_quantity() -> None:
    """Of the quantities with a fixed name; `make parity-table` writes all of them."""
    table = (ROOT / "benchmarks" / "results" / "parity.md").read_text(encoding="utf-8")
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    quantities = {name for text in sources for name in re.findall(r'\bparity\(\s*"([^"]+)"', text)}
    assert len(quantities) > 20
    assert [name for name in sorted(quantities) if f"| {name} |" not in table] == []
