"""`plugins=` and `recipes=`: code and recipes from folders that the user names, and from nowhere else."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from data_pipeline.core import plugins
from data_pipeline.core.schema import ConfigError, load
from launch import main
from launch.cli.compose import compose
from launch.cli.groups import groups
from launch.cli.outside import RECIPES, take_outside
from launch.config import PretrainJob
from pretrain import registry

PLUGIN = """
from pathlib import Path
from typing import Annotated, Literal
from data_pipeline.core.schema import about, config
from pretrain.interfaces.configs import ObjectiveConfig

Path(__file__).with_suffix(".imported").touch()

@config
class Config(ObjectiveConfig):
    name: Literal["mine"] = "mine"
    loudness: Annotated[float, about("how loud", ge=0)] = 0.5

def build(config, shape):
    raise NotImplementedError
"""


@pytest.fixture(autouse=True)
def no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (plugins.VARIABLE, RECIPES):
        monkeypatch.setenv(name, "")  # restored after the test, whatever it sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own" / "objectives").mkdir(parents=True)
    (tmp_path / "own" / "objectives" / "mine.py").write_text(PLUGIN)
    return tmp_path / "own"


def marker(folder: Path) -> Path:
    return folder / "objectives" / "mine.imported"


def job(*overrides: str) -> PretrainJob:
    return load(PretrainJob, compose("pretrain", ["data.shards=s", *overrides]))


@pytest.mark.parametrize("form", ["plugins={}", "plugins=[{}]", "+plugins=['{}']"])
def test_a_plug_in_is_a_choice_with_its_own_fields(folder: Path, form: str) -> None:
    assert take_outside(["seed=3", form.format(folder)]) == ["seed=3"]
    assert "mine" in groups()["objective"]
    assert dict(vars(job("objective=mine", "objective.loudness=2").objective))["loudness"] == 2.0
    with pytest.raises(ConfigError, match=r"objective\.loudnes.*did you mean .*loudness"):
        job("objective=mine", "objective.loudnes=2")


def test_a_yaml_file_of_the_folder_sets_fields(folder: Path) -> None:
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "conf" / "objective" / "mine.yaml").write_text("name: mine\nloudness: 7\n")
    take_outside([f"plugins={folder}"])
    assert dict(vars(job("objective=mine").objective))["loudness"] == 7.0


def test_no_config_makes_auricle_import_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.name=.*mine.*plugins=FOLDER"):
        load(PretrainJob, {"data": {"shards": "s"}, "frontend": {"name": "log_mel"}, "objective": {"name": "mine"}})
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"objective": {"name": "mine"}, "plugins": [str(folder)]}))
    assert main.main(["evaluate", f"checkpoint={run}"]) == 2
    assert main.main(["pretrain", "objective=mine", "data.shards=s"]) == 2
    assert "plugins=FOLDER" in capsys.readouterr().err
    assert not marker(folder).exists()
    take_outside([f"plugins={folder}"])
    registry.config_type("objectives", "mine")
    assert marker(folder).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import no_such_module", ["mine.py", "cannot be imported", "no_such_module"]),
        (PLUGIN.replace('"mine"', '"other"'), ["mine.py", "name", "mine"]),
        (PLUGIN.replace("ObjectiveConfig", "HeadConfig"), ["mine.py", "ObjectiveConfig"]),
        (PLUGIN.partition("def build")[0], ["mine.py", "build"]),
    ],
    ids=["import", "name", "base class", "build"],
)
def test_a_faulty_plug_in_is_named_with_the_remedy(folder: Path, content: str, words: list[str]) -> None:
    (folder / "objectives" / "mine.py").write_text(content)
    take_outside([f"plugins={folder}"])
    with pytest.raises(ConfigError) as error:
        registry.config_type("objectives", "mine")
    assert all(word in str(error.value) for word in words)


def test_names_of_others_and_missing_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        take_outside([f"plugins={tmp_path}/nowhere"])
    with pytest.raises(ConfigError, match=r"objectives/NAME\.py"):
        take_outside([f"plugins={tmp_path}"])
    (folder / "objectives" / "hubert.py").write_text(PLUGIN)
    with pytest.raises(ConfigError, match=r"hubert\.py: there is another objective hubert"):
        take_outside([f"plugins={folder}"])


def test_an_entry_point_adds_the_plug_ins_of_a_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "some_plug_ins"
    package.parent.mkdir()
    folder.rename(package)
    (package / "__init__.py").write_text("")
    described = tmp_path / "site" / "some_plug_ins-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plug-ins\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[auricle.plugins]\nmine = some_plug_ins\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert importlib.metadata.version("some-plug-ins") == "1.0"
    plugins.installed.cache_clear()
    try:
        assert dict(vars(job("objective=mine").objective))["loudness"] == 0.5
    finally:
        plugins.installed.cache_clear()
        for name in [name for name in sys.modules if name.startswith("some_plug_ins")]:
            del sys.modules[name]


def test_recipes_of_a_folder_are_experiments(tmp_path: Path) -> None:
    recipe = "# @package _global_\ndefaults:\n  - best_rq_tiny\nname: louder\noptimizer: {lr: 2e-3}\n"
    (tmp_path / "louder.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match="recipes=FOLDER"):
        job("+experiment=louder")
    take_outside([f"recipes={tmp_path}"])
    made = job("+experiment=louder")
    assert (made.optimizer.lr, made.name, made.objective.name) == (2e-3, "louder", "best_rq")
    (tmp_path / "best_rq_tiny.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match="another experiment best_rq_tiny"):
        groups()


def test_missing_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        take_outside([f"recipes={tmp_path}/nowhere"])
    with pytest.raises(ConfigError, match=r"NAME\.yaml"):
        take_outside([f"recipes={tmp_path}"])
