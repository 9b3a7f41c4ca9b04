"""The `auricle` command: overrides, help, error messages, exit codes."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.core.schema import ConfigError, document, dump, load
from launch import main
from launch.cli.command_table import COMMANDS, FIRST_WORDS
from launch.cli.compose import compose, to_hydra, to_yaml
from launch.cli.groups import CONF, groups
from launch.config import PretrainJob
from launch.exit_codes import ExitCode
from tests.support.paths import ROOT

TINY = ["+experiment=best_rq_tiny", "data.shards=shards"]


def auricle(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)


def test_help_is_fast_and_names_every_command() -> None:
    start = time.monotonic()
    done = auricle("--help")
    assert time.monotonic() - start < 3.0
    assert done.returncode == 0
    assert all(command in done.stdout for command in main.COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 100
    heavy = "import launch.main, sys; launch.main.main(['--help']); print({'torch', 'ray', 'hydra'} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert loaded.splitlines()[-1] == "set()"


@pytest.mark.parametrize("choice", [["objective=wav2vec2"], TINY[:1]])
def test_pretrain_help_explains_every_field(choice: list[str]) -> None:
    done = auricle("pretrain", *choice, "--help")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for row in document(PretrainJob, "", compose("pretrain", choice)):
        assert row.path in said
        assert " ".join(row.description.split()) in said
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=best_rk"], ["objective=best_rk", "did you mean best_rq?", "wav2vec2"]),
        (["+experiment=best_rq_tinny"], ["experiment=best_rq_tinny", "best_rq_tiny"]),
        (["launcher=slurmm"], ["launcher=slurmm", "local"]),
        (
            [*TINY, "optimizer.lrr=1"],
            ["optimizer.lrr=1", "no such field", "did you mean optimizer.lr?", "weight_decay"],
        ),
        ([*TINY, "optimizer.lr=-1"], ["optimizer.lr=-1", "greater than 0", "> 0"]),
        ([*TINY, "optimizer.lr=fast"], ['optimizer.lr="fast"', "number"]),
        ([*TINY, "engine.precision=bf61"], ["engine.precision", "fp32, bf16", "did you mean bf16?"]),
        ([*TINY, "objective.codez=3"], ["objective.codez=3", "no such field"]),
        ([*TINY, "batch_seconds=3"], ["batch_seconds=3", "did you mean data.batch_seconds?"]),
        ([*TINY, "launcher.processes=5"], ["data.micro_batches=4", "5 ranks"]),
        ([*TINY, "name=a/b"], ["name='a/b'", "slash"]),
        (["data.shards"], ["'data.shards' is not an override", "field=value"]),
        ([*TINY, "--dry-runs"], ["no switch --dry-runs", "did you mean --dry-run?"]),
        (TINY[:1], ["data.shards", "required"]),
        ([*TINY, "optimizer.lr=-1", "seed=x"], ["optimizer.lr", "seed"]),
        ([*TINY, "objective.name=hubrt"], ['objective.name="hubrt"', "no such objective", "did you mean hubert?"]),
        ([*TINY, "date.workers=3"], ["date.workers=3", "did you mean data.workers?"]),
        ([*TINY, "optimizer=3"], ["optimizer=3", "optimizer.lr"]),
        ([*TINY, "engine=deepspeed"], ["engine=", "group of fields; write engine.name=deepspeed"]),
        ([*TINY, "engine=3"], ["engine=3", "engine.name, ", "engine.meta\n"]),
        (["help"], ["'help' is not an override", "--help lists the fields"]),
        ([*TINY, "optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]", "too few values"]),
        ([*TINY, "optimizer.betas=[0.9,1.2]"], ["optimizer.betas", "1.2", "< 1"]),
        ([*TINY, "encoder.heads=3"], ["encoder.heads=3", "256"]),
        ([*TINY, "engine.name=torch", "engine.offload=cpu"], ["engine.offload", "cpu", "engine.name=deepspeed"]),
        ([*TINY, "engine.zero_stage=0", "engine.offload=cpu"], ["engine.offload", "zero_stage of 1 to 3"]),
        ([*TINY, "engine.zero_stage=2", "engine.offload=nvme"], ["engine.offload", "zero_stage=3, and it is 2"]),
        ([*TINY, "engine.zero_stage=3", "engine.offload=nvme"], ["engine.offload_folder", "needs a folder"]),
        ([], ["data.shards: is required", "give data.shards=VALUE (folder or URL"]),
        ([*TINY, "data.batch_seconds=20"], ["data.batch_seconds=20", "data.micro_batches=4", "at least 32"]),
        ([*TINY, "encoder.dim=9223372036854775807"], ["encoder.dim=9223372036854775807", "too large"]),
        ([*TINY, "encoder.dim=2147483647"], ["encoder.heads=4", "must divide encoder.dim=2147483647"]),
        ([*TINY, "data.micro_batches=1000000000000"], ["data.micro_batches=1000000000000", "too large"]),
        ([*TINY, "train.steps=1" + 60 * "0"], ["train.steps", "too large"]),
        ([*TINY, "seed=9223372036854775808"], ["seed=9223372036854775808", "too large"]),
        ([*TINY, "engine.timeout_minutes=1e300"], ["engine.timeout_minutes=1e+300", "too large"]),
        ([*TINY, "engine.timeout_minutes=1e9"], ["engine.timeout_minutes=1000000000.0", "525600"]),
        ([*TINY, "data.timeout_seconds=1e11"], ["data.timeout_seconds", "31536000"]),
        ([*TINY, "optimizer.lr=inf"], ["optimizer.lr", "finite"]),
        ([*TINY, "optimizer.lr=nan"], ["optimizer.lr", "finite"]),
        ([*TINY, "hydra.nonsense=3"], ["hydra.nonsense=3", "leave it out"]),
        ([*TINY, "hydra/launcher=x"], ["hydra/launcher=x", "leave it out"]),
        ([*TINY, "+hydra.run.dir=/tmp/x"], ["hydra.run.dir=/tmp/x", "leave it out"]),
        ([*TINY, "~hydra.job"], ["~hydra.job", "leave it out"]),
        ([*TINY, "seed=1,2"], ['seed="1,2"', "--multirun"]),
        ([*TINY, "train.steps=range(3)"], ["train.steps", "--multirun"]),
        ([*TINY, "--seed", "3"], ["--seed", "write seed=3"]),
        ([*TINY, "--train.steps=7"], ["--train.steps=7", "write train.steps=7"]),
        ([*TINY, "--optimizer.lr"], ["--optimizer.lr", "write optimizer.lr=VALUE"]),
        ([*TINY, "--objective", "hubert"], ["--objective", "write objective=hubert"]),
        ([*TINY, "data.labels=speaker"], ["data.labels", "is a list", "data.labels=[speaker]"]),
        ([*TINY, "name=" + 300 * "x"], ["name=", "at most 200 bytes"]),
        ([*TINY, "name='${oc.env:SOME_CREDENTIAL}'"], ["name", "SOME_CREDENTIAL", "write the value itself"]),
        ([*TINY, "name='x${oc.env:AURICLE_NOT_SET}'"], ["AURICLE_NOT_SET", "is not set"]),
    ],
)
def test_a_wrong_override_names_the_remedy(
    overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main.main(["pretrain", f"runs={tmp_path}", *overrides]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not list(tmp_path.iterdir()), "a refused config leaves no files"


def test_environment_variables_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert compose("pretrain", [*TINY, "runs=${oc.env:SCRATCH}/runs"])["runs"] == "/scratch/me/runs"
    monkeypatch.delenv("SCRATCH")
    assert compose("pretrain", [*TINY, "runs=${oc.env:SCRATCH,here}/runs"])["runs"] == "here/runs"


@pytest.mark.parametrize(
    ("variables", "encoding"),
    [
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "utf-8"),
        ({"LC_ALL": "POSIX"}, "utf-8"),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, "ascii"),
        ({"LC_ALL": "no_such_locale"}, "utf-8"),
    ],
)
def test_commands_work_in_any_locale(variables: dict[str, str], encoding: str, tmp_path: Path) -> None:
    """Non-ASCII names are read, found and printed; characters that the stream cannot encode are escaped."""
    folder = tmp_path / "läufe" / "größe"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text('{"name": "größe", "train": {"steps": 5}}', encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "launch.main", "runs", str(folder.parent)],
        capture_output=True,
        timeout=60,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
    )
    assert done.returncode == 0, done.stderr
    assert ("größe" if encoding == "utf-8" else r"gr\xf6\xdfe") in done.stdout.decode(encoding)


def test_help_explains_a_command_and_suggests_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["help", "data"]) == 0
    assert "find-caps" in capsys.readouterr().out
    assert main.main(["help"]) == 0
    assert "completion" in capsys.readouterr().out
    assert main.main(["help", "pretrian"]) == ExitCode.USAGE
    assert "did you mean `auricle pretrain`?" in capsys.readouterr().err


def test_a_misspelt_or_missing_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["pretrian"]) == ExitCode.USAGE
    assert "did you mean `auricle pretrain`?" in capsys.readouterr().err
    assert main.main([]) == ExitCode.USAGE


def test_unexpected_errors_are_one_paragraph_without_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: list[str]) -> int:
        raise OSError("the disk is on fire")

    monkeypatch.setattr("launch.commands.doctor.run", broken)
    monkeypatch.delenv("AURICLE_DEBUG", raising=False)
    assert main.main(["doctor"]) == ExitCode.FAILED
    assert "\nauricle doctor: the disk is on fire\n" in capsys.readouterr().err
    monkeypatch.setenv("AURICLE_DEBUG", "1")
    with pytest.raises(OSError, match="on fire"):
        main.main(["doctor"])


def test_cfg_output_composes_to_the_same_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["pretrain", *TINY, "optimizer.lr=3e-4", "--cfg"]) == 0
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert values == compose("pretrain", [*TINY, "optimizer.lr=3e-4"])
    assert values["optimizer"]["lr"] == 3e-4


def test_dry_run_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.main(["pretrain", *TINY, f"runs={tmp_path}", "launcher.processes=2", "device=cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "deepspeed.launcher.runner --num_gpus 2" in said
    assert "launch.workers.rank" in said
    assert not list(tmp_path.iterdir())


def test_settings_without_effect_are_noted_when_the_config_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    steps = ["train.steps=20", "schedule.warmup_steps=30", f"runs={tmp_path}", "--dry-run"]
    assert main.main(["pretrain", *TINY, *steps]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("note: schedule.warmup_steps=30") == 1
    assert "warmup_steps" not in shown.out, "standard output is for the plan alone"
    sweep = ["seed=1,2", "--multirun", "launcher=slurm", "launcher.nodes=2"]
    assert main.main(["pretrain", *TINY, *steps, *sweep]) == 0
    assert capsys.readouterr().err.count("note: schedule.warmup_steps=30") == 1, "once for all runs of an array"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-such-switch"], ["no switch --no-such-switch", "--help"]),
        (["--dry-runn"], ["no switch --dry-runn"]),
        (["train.stepps=3"], ["did you mean train.steps?"]),
        (["--cfg"], ["auricle pretrain"]),
    ],
)
def test_the_demo_refuses_wrong_arguments_before_it_writes_anything(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["demo", *arguments]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_says_how_to_continue(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.main.importlib.import_module", interrupted)
    assert main.main([command]) == ExitCode.INTERRUPTED
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"auricle {command}: stopped; ")
    assert "same command" in said or "command again" in said


def test_a_missing_package_is_named_as_pip_knows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.cluster")

    monkeypatch.setattr("launch.commands.doctor.run", lacking)
    assert main.main(["doctor"]) == ExitCode.FAILED
    assert "auricle doctor: needs the package scikit-learn: pip install scikit-learn" in capsys.readouterr().err


TEXT = st.text(string.printable + "äéß語", min_size=1).filter(lambda text: "${" not in text)


@settings(max_examples=300, deadline=None)
@given(TEXT.map(lambda text: f"/data/{text}"))
def test_any_path_survives_quoting(path: str) -> None:
    read = OverridesParser.create().parse_override(to_hydra(f"data.shards={path}", {}, set())).value()
    assert (read.text if isinstance(read, QuotedString) else read) == path


@pytest.mark.parametrize(
    "path", ["/a b/c,d", "/it's (mine)", "/back\\slash\\", '/"x"', "/a=b&c;rm -rf $HOME", "/[1]{2}"]
)
def test_paths_with_special_characters_survive_composition(path: str) -> None:
    assert compose("pretrain", [f"data.shards={path}"])["data"]["shards"] == path


@pytest.mark.parametrize("symbols", [" abc", "abc ", " ", " 'abc", "  a,b "])
def test_spaces_around_a_text_are_kept(symbols: str) -> None:
    assert compose("tokens", [f"symbols={symbols}"])["symbols"] == symbols


def test_spaces_around_other_values_are_not() -> None:
    values = compose("pretrain", ["train.steps= 7", "data.images= null"])
    assert values["train"]["steps"] == 7
    assert values["data"]["images"] is None


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_groups_may_be_selected_with_or_without_signs(sign: str) -> None:
    assert compose("pretrain", [f"{sign}objective=best_rq"])["objective"]["name"] == "best_rq"
    assert compose("pretrain", [f"{sign}experiment=best_rq_tiny"])["name"] == "best_rq_tiny"


def test_the_command_line_overrides_the_experiment() -> None:
    values = compose("pretrain", ["encoder=transformer", "+experiment=best_rq_tiny", "train.steps=7"])
    assert "dim" not in values["encoder"]
    assert values["train"]["steps"] == 7


def test_strings_that_look_like_numbers_stay_strings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["pretrain", *TINY, "name=007", "launcher=slurm", "launcher.after=12", "seed=3", "--cfg"]) == 0
    said = capsys.readouterr().out
    assert "name: '007'" in said
    assert "after: '12'" in said
    assert "seed: 3" in said


def test_home_is_expanded() -> None:
    values = compose("pretrain", ["data.shards=~/shards", "heads={}", "name=x~/y"])
    assert values["data"]["shards"] == str(Path("~/shards").expanduser())
    assert values["name"] == "x~/y"


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_shipped_experiment_loads(experiment: str) -> None:
    job = load(PretrainJob, compose("pretrain", [f"+experiment={experiment}", "data.shards=s"]))
    assert load(PretrainJob, dump(job)) == job


@pytest.mark.parametrize("group", ["objective", "frontend", "encoder", "launcher"])
def test_every_shipped_choice_loads(group: str) -> None:
    for choice in groups()[group]:
        head = ["heads.text.name=ctc", "optimizer.weight_decay=0"] if choice == "none" else []
        load(PretrainJob, compose("pretrain", [f"{group}={choice}", "data.shards=s", *head]))


def test_broken_yaml_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "pretrain.yaml").write_text("defaults:\n  - objective: gone\n")
    (tmp_path / "objective").mkdir()
    with pytest.raises(ConfigError, match=r"pretrain: .*gone"):
        compose("pretrain", [], folder=tmp_path)


def test_yaml_round_trip() -> None:
    values = compose("pretrain", TINY)
    from omegaconf import OmegaConf

    assert OmegaConf.to_container(OmegaConf.create(to_yaml(values))) == values
    assert json.dumps(values)
    assert CONF == ROOT / "conf"


@pytest.mark.parametrize("command", ["preprocess", "targets", "pretrain", "evaluate"])
def test_a_command_says_at_once_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, "nonsense"]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert said.startswith(f"auricle {command}: {FIRST_WORDS[command]}\n")
    assert main.main([command, "--help"]) == 0
    assert FIRST_WORDS[command] not in capsys.readouterr().err


def test_every_command_that_may_be_slow_says_at_once_what_it_does() -> None:
    assert set(COMMANDS) - set(FIRST_WORDS) == {"completion"}, "the shell reads its output"


def test_the_first_words_need_no_slow_import() -> None:
    code = "import sys, launch.main; print(sorted({'torch', 'ray', 'hydra', 'numpy', 'pydantic'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_a_file_is_not_called_a_missing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "a.tsv").write_text("path\n")
    out = f"out={tmp_path / 'out'}"
    for arguments, words in (
        (["preprocess", f"corpus.path={tmp_path / 'a.wav'}", out], ["is a file", str(tmp_path)]),
        (["preprocess", f"corpus.path={tmp_path / 'a.tsv'}", out], ["is a file", "corpus=manifest"]),
        (["preprocess", f"corpus.path={tmp_path}", f"out={tmp_path / 'a.tsv' / 'x'}"], ["out=", "a.tsv is a file"]),
        (["preprocess", "corpus=manifest", f"corpus.path={tmp_path}", out], ["is a folder", "in it: a.tsv"]),
        (["shards", "stats", str(tmp_path / "a.wav")], ["is a file", "_done"]),
    ):
        assert main.main(arguments) == ExitCode.USAGE
        said = capsys.readouterr().err
        assert all(word in said for word in words)
        assert "no such folder" not in said
    assert not list(tmp_path.glob("runs/*")), "a refused job is no failed job"


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_missing_input_is_found_before_there_is_a_job(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, missing in (("preprocess", "corpus.path=nowhere"), ("targets", "shards=nowhere")):
        assert main.main([command, missing, "out=made", f"launcher={launcher}"]) == ExitCode.USAGE
        assert f"{missing}: there is no such file or folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
