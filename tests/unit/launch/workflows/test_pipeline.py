"""The pipeline's command lines, its up-to-date checks, and the run folders of its jobs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError
from data_pipeline.labels.store import LabelMetadata
from launch import main
from launch.cli import request as job
from launch.cli.compose import sweep
from launch.config import EvaluateJob, PretrainJob, RayConfig, SlurmConfig, TargetsJob
from launch.exit_codes import ExitCode
from launch.launchers.ray import RayJobs
from launch.launchers.slurm import SlurmSubmitter
from launch.workers import task
from launch.workers.build import require_fitting_labels
from launch.workflows.pipeline import PipelineConfig, PipelineStep, require_step_inputs, split, steps, why_pretraining
from pretrain.checkpointing.tensor_files import save_tensors
from tests.support.checkpoint_states import write_state
from tests.support.corpora import preprocess_here
from tests.support.sounds import many, write_corpus

CORPUS = f"preprocess.corpus.path={Path(__file__).parent}"
HOSTILE = "x$(touch pwned);`id`&|'\" #SBATCH --nodes=9"


@pytest.fixture(autouse=True)
def speech(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets AURICLE_SPEECH to a folder with a manifest of labelled audio for the evaluation step."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "manifest.tsv").write_text("path\tspeaker\tcorpus\tsplit\n")
    (folder / "phones").mkdir()
    (folder / "phones" / "auto_pocketsphinx.tsv").write_text("path\tstart_s\tend_s\tphone\n")
    monkeypatch.setenv("AURICLE_SPEECH", str(folder))
    return folder


def chain(*arguments: str) -> list[PipelineStep]:
    _, given, launcher = split([CORPUS, *arguments])
    return steps(PipelineConfig(folder="work"), given, launcher)


def test_each_step_reads_the_output_of_the_previous_one() -> None:
    preprocess, targets, pretrain, evaluate = chain(
        "pretrain.objective=hubert", "targets.classes=50", "evaluate.task=abx"
    )
    assert preprocess.job().out == "work/shards"
    assert targets.job().shards == pretrain.job().data.shards == ("work/shards",)
    assert pretrain.job().data.targets == {"units": targets.job().out}
    assert (pretrain.job().objective.labels, pretrain.job().objective.units) == ("units", 50)
    assert pretrain.job().objective.label_rate_hz == 100.0
    assert Path(evaluate.job().checkpoint) == pretrain.folder()
    assert evaluate.job().task == "abx"


def test_an_objective_without_labels_needs_no_targets() -> None:
    assert [step.command for step in chain("pretrain.objective=best_rq")] == ["preprocess", "pretrain", "evaluate"]


def test_held_out_speakers_are_measured_during_training() -> None:
    held_out = "preprocess.split.valid=0.1"
    training = chain(held_out, "pretrain.objective=best_rq")[1].arguments
    assert {"data.shards=work/shards/train", "data.valid=work/shards/valid"} <= {*training}
    own = chain(held_out, "pretrain.objective=best_rq", "pretrain.data.valid=mine")[1].job()
    assert isinstance(own, PretrainJob)
    assert own.data.valid == ("mine",)


def test_held_out_speakers_are_labelled_with_the_same_centres() -> None:
    given = ("preprocess.split.valid=0.1", "pretrain.objective=hubert", "targets.classes=50")
    _, targets, held_out, pretrain, _ = chain(*given)
    first, second, run = targets.job(), held_out.job(), pretrain.job()
    assert isinstance(first, TargetsJob)
    assert isinstance(second, TargetsJob)
    assert isinstance(run, PretrainJob)
    assert (second.shards, second.kmeans, second.classes) == (("work/shards/valid",), first.out, 50)
    assert targets.folder() != held_out.folder()
    assert (run.data.valid, run.data.valid_targets) == (("work/shards/valid",), {"units": second.out})
    assert len(chain(*given, "pretrain.data.valid=[work/shards/valid]")) == 4


def test_unread_held_out_speakers_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    labels = ("pretrain.data.targets.units=work/shards/labels", "pretrain.objective.labels=units")
    given = ["preprocess.split.valid=0.1", CORPUS, "pretrain.objective=hubert", *labels]
    _, overrides, launcher = split(given)
    steps(PipelineConfig(folder="work", steps=("preprocess", "pretrain")), overrides, launcher)
    said = capsys.readouterr().out
    assert "pretrain.data.valid_targets" in said
    assert "auricle targets" in said


@pytest.mark.parametrize(
    ("field", "override"),
    [
        ("preprocess.corpus.path=nowhere", "preprocess.corpus.path=nowhere"),
        ("targets.features=nowhere", "targets.features=nowhere"),
        ("targets.kmeans=nowhere", "targets.kmeans=nowhere"),
        ("pretrain.init=nowhere", "pretrain.init=nowhere"),
        ("pretrain.data.tokens.text=nowhere", "pretrain.data.tokens.text=nowhere"),
        ("pretrain.data.valid=nowhere", "pretrain.data.valid=nowhere"),
        ("pretrain.data.augment.noise=nowhere", "pretrain.data.augment.noise=nowhere"),
        ("pretrain.data.augment.rir=nowhere", "pretrain.data.augment.rir=nowhere"),
        ("pretrain.heads.who.classes_file=nowhere", "pretrain.heads.who={name: classifier, classes_file: nowhere}"),
        ("evaluate.data.keywords=nowhere", "evaluate.data={keywords: nowhere}"),
        ("evaluate.phones=/nowhere", "evaluate.task=phones evaluate.phones=/nowhere"),
        ("evaluate.asr.lm=nowhere", "evaluate.task=asr evaluate.asr.lm=nowhere"),
        ("evaluate.asr.words=nowhere", "evaluate.task=asr evaluate.asr.lm=. evaluate.asr.words=nowhere"),
        ("pretrain.objective.teacher=nowhere", "pretrain.objective=distil pretrain.objective.teacher=nowhere"),
    ],
)
def test_a_missing_input_of_any_step_is_reported_by_its_field(
    field: str, override: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [f"folder={tmp_path / 'work'}", CORPUS, "pretrain.objective=hubert", "evaluate.task=keywords"]
    given = [override] if "{" in override else override.split()
    assert main.main(["pipeline", *arguments, *given, "launcher=slurm", "--dry-run"]) == ExitCode.USAGE
    assert f"{field}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inputs_at_urls_of_earlier_jobs_and_in_containers_are_left_to_the_job() -> None:
    container = ("launcher=slurm", "launcher.container=apptainer", "launcher.image=image.sif")
    for given in (
        ("preprocess.corpus.path=s3://bucket/speech",),
        ("preprocess.corpus.path=nowhere", "preprocess.launcher.after=17", "launcher=slurm"),
        ("preprocess.corpus.path=nowhere", *container),
    ):
        require_step_inputs(chain("pretrain.objective=best_rq", *given))
    with pytest.raises(ConfigError, match=r"preprocess\.corpus\.path=nowhere: there is no such file"):
        require_step_inputs(chain("pretrain.objective=best_rq", "preprocess.corpus.path=nowhere", "launcher=slurm"))


def test_a_missing_table_of_phones_is_reported_before_the_first_step(
    speech: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (speech / "phones" / "auto_pocketsphinx.tsv").unlink()
    for switches in ([], ["--dry-run"]):
        arguments = ["pipeline", f"folder={tmp_path / 'work'}", CORPUS, "pretrain.objective=best_rq", *switches]
        assert main.main(arguments) == ExitCode.USAGE
        said = capsys.readouterr().err
        assert f"evaluate.phones={speech}/phones/auto_pocketsphinx.tsv: there is no such file" in said
        assert "start_s, end_s" in said
        assert "set phones=TABLE" in said
    assert not list(tmp_path.iterdir())


def test_a_missing_input_of_the_last_step_is_reported_before_the_first_step(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names both remedies; a dry run makes the same check."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AURICLE_SPEECH")
    for switches in ([], ["--dry-run"]):
        arguments = ["pipeline", "folder=work", CORPUS, "pretrain.objective=best_rq", *switches]
        assert main.main(arguments) == ExitCode.USAGE
        said = capsys.readouterr().err
        assert "manifest=" in said
        assert "AURICLE_SPEECH" in said
        assert main.main([*arguments, "evaluate.manifest=nowhere.tsv"]) == ExitCode.USAGE
        assert "manifest=nowhere.tsv: there is no such file" in capsys.readouterr().err
        assert main.main([*arguments, f"evaluate.manifest={tmp_path}"]) == ExitCode.USAGE
        assert "is a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_all_steps_share_the_launcher_unless_a_step_overrides_it() -> None:
    made = chain("pretrain.objective=best_rq", "launcher=slurm", "launcher.nodes=2", "pretrain.launcher.nodes=8")
    assert [step.job().launcher.nodes for step in made] == [2, 8, 2]


@pytest.mark.parametrize("wrong", ["pretrain.train.stepz=3", "preprocess_.out=x", "steps=[preprocess,pretarin]"])
def test_a_wrong_field_of_any_step_is_reported_before_the_first_step(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main.main(["pipeline", "folder=work", CORPUS, "pretrain.objective=best_rq", wrong, "--dry-run"])
        == ExitCode.USAGE
    )
    assert wrong.partition("=")[0].partition(".")[2][:4] in capsys.readouterr().err


def test_a_dry_run_shows_every_script_and_submits_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main.main(["pipeline", "folder=work", CORPUS, "pretrain.objective=hubert", "launcher=slurm", "--dry-run"]) == 0
    )
    said = capsys.readouterr().out
    assert said.count("sbatch --parsable") == 4
    assert said.count("ray.sbatch") >= 2
    assert "--dependency=afterok:JOB_OF_preprocess" in said
    assert "--dependency=afterok:JOB_OF_targets" in said
    assert not list(tmp_path.iterdir())


def test_a_result_is_up_to_date_until_any_byte_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus", many(4, 0.6))
    step = PipelineStep("preprocess", ("corpus.path=corpus", "out=shards", "min_shards=2"))
    assert step.why() == "was not finished before"
    monkeypatch.setattr("launch.workers.programs.preprocess.work", preprocess_here)
    folder = task.prepare("preprocess", step.job())
    task.perform(folder)
    assert step.why() == ""
    assert PipelineStep("preprocess", (*step.arguments, "codec=wav")).why() == "was finished with another config"
    write_corpus(tmp_path / "corpus", many(5, 0.6))
    assert step.why() == "has output that changed since", "new recordings make the result outdated"
    task.perform(folder)
    assert step.why() == ""
    shard = next((tmp_path / "shards").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert step.why() == "has output that changed since"


@pytest.mark.parametrize("launcher", [SlurmConfig(), RayConfig(dashboard="http://127.0.0.1:1")])
@pytest.mark.parametrize("command", ["preprocess", "targets", "evaluate", "pretrain"])
def test_every_command_has_a_plan_on_every_launcher(
    command: str, launcher: SlurmConfig | RayConfig, tmp_path: Path
) -> None:
    submitter = SlurmSubmitter(launcher, command) if isinstance(launcher, SlurmConfig) else RayJobs(launcher, command)
    plan = submitter.plan(tmp_path / HOSTILE)
    assert (
        "launch.launchers.ray_driver" in plan
        if command == "pretrain" and isinstance(launcher, RayConfig)
        else "launch." in plan
    )
    if isinstance(submitter, RayJobs):
        import shlex

        assert shlex.split(plan)[-1 if "--ray" not in plan else -3] == str(tmp_path / HOSTILE), (
            "the folder must be a single shell word"
        )


def test_the_run_folder_of_a_task_documents_it_and_contains_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setattr("sys.argv", ["auricle", "evaluate", "api_key=hush-hush"])
    job = EvaluateJob(checkpoint="runs/mine", runs=str(tmp_path))
    folder = task.prepare("evaluate", job)
    assert folder.parent == tmp_path
    assert folder.name.startswith("evaluate_mine_")
    assert task.folder_of("evaluate", dataclasses.replace(job, launcher=job.launcher)) == folder
    assert task.folder_of("evaluate", dataclasses.replace(job, task="keywords")) != folder
    assert json.loads((folder / "task.json").read_text())["config"]["checkpoint"] == "runs/mine"
    assert {"task.json", "environment.json", "git.diff"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.rglob("*") if path.is_file() and "hush-hush" in path.read_text()]
    with pytest.raises(ConfigError, match="out: holds an address with a password"):
        task.prepare("targets", TargetsJob(shards="s", out="s3://me:hush-hush@host/x", runs=str(tmp_path)))


def test_a_failed_job_is_not_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main.main(["preprocess", "corpus.path=empty", "out=shards"]) == ExitCode.USAGE
    assert not (tmp_path / "runs" / "preprocess_shards").exists(), "nothing was done that could be listed as failed"
    job = PipelineStep("preprocess", ("corpus.path=empty", "out=shards")).job()
    folder = task.prepare("preprocess", job)
    assert task.main([str(folder)]) == ExitCode.USAGE
    assert not (folder / "result.json").exists()
    assert task.why_outdated("preprocess", job)


def test_a_damaged_run_ends_a_pipeline_and_names_the_remedy(tmp_path: Path) -> None:
    wanted = ["+experiment=best_rq_tiny", "data.shards=none", f"runs={tmp_path}", "name=mine", "train.steps=5"]
    request = job.read("pretrain", PretrainJob, wanted)
    assert request is not None
    folder = tmp_path / "mine" / "checkpoints" / "step_00000005"
    folder.mkdir(parents=True)
    save_tensors({"weight": torch.ones(3)}, folder / "model.safetensors")
    write_state(tmp_path / "mine", 5)
    with pytest.raises(DamagedFileError, match=r"checksum mismatch.*model.safetensors.*latest"):
        why_pretraining(request.config)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LabelMetadata("k1", 100, 100), r"objective.label_rate_hz=50: .* have 100 Hz; set objective.label_rate_hz=100"),
        (LabelMetadata("k1", 50, 500), r"objective.units=100: .* have 500 classes; set objective.units=500"),
        (LabelMetadata("k1", 50, 100), ""),
    ],
)
def test_labels_incompatible_with_the_objective_are_refused(labels: LabelMetadata, said: str, tmp_path: Path) -> None:
    labels.write(str(tmp_path / "labels"))
    wanted = ["objective=hubert", "objective.labels=units", "objective.units=100", "data.shards=none"]
    request = job.read("pretrain", PretrainJob, [*wanted, f"data.targets.units={tmp_path / 'labels'}"])
    assert request is not None
    with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
        require_fitting_labels(request.config)


def test_a_sweep_runs_every_combination() -> None:
    assert sweep(["a=1", "b=1,2", "c=range(2)"]) == [["a=1", f"b={b}", f"c={c}"] for b in (1, 2) for c in (0, 1)]
    with pytest.raises(ConfigError, match="no override lists several values"):
        sweep(["a=1"])


def test_a_sweep_plan_is_one_job_array(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain = ["+experiment=best_rq_tiny", "data.shards=s", f"runs={tmp_path}", "launcher=slurm", "launcher.parallel=2"]
    assert main.main(["pretrain", *plain, "optimizer.lr=1e-3,1e-4", "seed=1,2", "--multirun", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "best_rq_tiny_3: optimizer.lr=0.0001 seed=2" in said
    assert "--array=0-3%2" in said
    assert f"{tmp_path}/best_rq_tiny_%a/logs/slurm.log" in said
    assert not list(tmp_path.iterdir())
