"""Classes by few weights: `auricle finetune task=classify tune=…`, one base for many tasks, and `auricle adapt`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError
from launch.exit_codes import ExitCode
from launch.main import main
from launch.workflows.adapting import classify
from pretrain.adaptation.tasks import open_tasks
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.stored import read_state
from pretrain.evaluate.manifest import read_audio, read_manifest
from tests.support.documents import commands, programs
from tests.support.paths import ROOT
from tests.support.tiny_shards import sounds, write_shards
from tests.support.training import save

PAGE = ROOT / "docs" / "few_weights.md"
LABELS = ("low", "high")


@pytest.fixture(scope="module")
def clips(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder of three clips for each of two classes, and a file without audio."""
    folder = tmp_path_factory.mktemp("clips")
    for label in LABELS:
        (folder / label).mkdir()
        for take in range(3):
            shutil.copy(corpus / f"0-{label}-{take}.wav", folder / label)
    (folder / "low" / "odd.wav").write_bytes(b"no audio")
    return folder


@pytest.fixture(scope="module")
def adapted(clips: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "run"
    shown = next(line for line in commands(PAGE) if line[0] == "adapt")
    places = {"clips/": str(clips), "runs/NAME": str(saved)} | dict.fromkeys(("new1.wav", "new2.wav"), "missing.wav")
    given = [places.get(word, word) for word in shown]
    assert main([*given, "--out", str(out), "--tune", "prompt", "--steps", "30"]) == ExitCode.DONE
    return out


def test_a_folder_of_clips_gives_an_adapted_run_and_classes_of_files(
    clips: Path, saved: Path, adapted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [row["loss/classes"] for row in read_rows(adapted / "metrics.jsonl")]
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    files = [str(clips / label / f"0-{label}-1.wav") for label in LABELS]
    found = list(classify(adapted, [*files, str(clips / "low" / "odd.wav")]))
    assert [(file, one.label) for file, one in found] == list(zip(files, LABELS, strict=True))
    assert "odd.wav: cannot be used" in " ".join(capsys.readouterr().err.split())
    small, whole = (
        folder / "model.safetensors" for folder in (adapted / "tuned", adapted / "checkpoints/step_00000030")
    )
    assert small.stat().st_size < 0.7 * whole.stat().st_size


def test_fewer_than_two_classes_are_refused(
    clips: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(clips / "low", tmp_path / "low")
    assert main(["adapt", str(tmp_path), str(saved)]) == ExitCode.USAGE
    said = " ".join(capsys.readouterr().err.split())
    assert "two classes or more; has low (3 clips)" in said
    assert "1 clips cannot be used: low/odd.wav" in said


@pytest.mark.slow
def test_another_base_ends_each_command_with_exit_code_2_and_both_checksums(
    clips: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, other, out = tmp_path / "tuned", tmp_path / "other", str(tmp_path / "out")
    shutil.copytree(adapted / "tuned", tuned)
    save(other, 4, seed=1)
    place, base = find_checkpoint(str(other)), read_state(tuned)["base"]
    shards = write_shards(tmp_path / "shards", [sounds([1.0] * 8)])
    sizes = [
        f"encoder.{size}" for size in ("dim=32", "layers=2", "heads=2", "ffn_dim=64", "norm=post", "positions=conv")
    ]
    sizes.append("tune.name=prompt")
    given_run = ["+experiment=best_rq_tiny", f"data.shards={shards}", "launcher.processes=1", "device=cpu"]
    given = (
        ["export", str(tuned), out, "--to", "torchscript"],
        ["compress", str(tuned), out],
        ["pretrain", *given_run, f"init={tuned}", f"runs={tmp_path / 'runs'}", *sizes],
        ["transcribe", f"checkpoint={tuned}", f"files={clips / 'low/0-low-0.wav'}"],
    )
    checksums = f"was tuned on a base with sha256 {base['sha256'][:12]}…, and {place} has"
    for new, said in ((place, checksums), (tmp_path / "gone", "its base cannot be read")):
        state = json.loads((tuned / "state.json").read_text())
        write_json(tuned / "state.json", state | {"base": base | {"checkpoint": str(new)}})
        for words in given:
            assert main(words) == ExitCode.USAGE, words
            shown = " ".join(capsys.readouterr().err.split())
            assert said in shown
            assert f"write the base's place into {tuned / 'state.json'}" in shown


def test_one_base_serves_tasks_in_a_batch(corpus: Path, adapted: Path) -> None:
    tasks = open_tasks({"run": str(adapted), "alone": str(adapted / "tuned")}, "cpu")
    assert len(tasks.models) == 1
    waves = [np.asarray(read_audio(u)) for u in read_manifest(corpus / "manifest.tsv")][:4]
    waves[1] = waves[1][:6000]
    together = tasks.classify(waves, ["run", "alone", "alone", "run"])
    for row, found in enumerate(together):
        (one,) = tasks.classify([waves[row]], ["alone"])
        assert found.label == one.label
        assert found.probability == pytest.approx(one.probability, abs=1e-5)
    with pytest.raises(ConfigError, match="must be one of run, alone"):
        tasks.classify(waves[:1], ["rum"])


def test_the_documented_program_runs(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = programs(PAGE)
    program = program.replace("runs/digits/tuned", str(adapted / "tuned")).replace("runs/language/tuned", str(adapted))
    exec(compile(program, str(PAGE), "exec"), {"wave_T": np.zeros(16_000, np.float32)})
    assert capsys.readouterr().out.startswith("1\n[Class(label=")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_classes_of_unseen_speakers_are_measured(corpus: Path, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [
        "finetune",
        f"checkpoint={saved}",
        "task=classify",
        "tune=lora",
        "tune.rank=2",
        "steps=20",
        "batch_seconds=6",
    ]
    assert main([*given, f"manifest={corpus}/manifest.tsv", f"out={out}", "data.workers=0"]) == ExitCode.DONE
    measured = json.loads((out / "results.json").read_text())["classes"]
    test = [u for u in read_manifest(corpus / "manifest.tsv") if u.split == "test"]
    found = open_tasks({"": str(out)}, "cpu").classify([np.asarray(read_audio(u)) for u in test], [""] * len(test))
    hits = [one.label == u.labels["label"] for one, u in zip(found, test, strict=True)]
    assert measured == {"accuracy": pytest.approx(np.mean(hits)), "chance": pytest.approx(1 / 3), "utterances": 18}


def test_what_cannot_be_tuned_is_refused(corpus: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["finetune", f"checkpoint={saved}", "task=classify", f"manifest={corpus}/manifest.tsv", "--dry-run"]
    for wrong, said in (
        (["tune=lora", "tune.rank=40"], "tune.rank=40: must be at most 32"),
        (["tune=lora", "tune.modules=[query]"], "there is no 'query'; there are: attention.out"),
        (["label=mood"], "no value in the column 'mood'"),
        (["tune=lora", "random_weights=true"], "take tune=full"),
        (["tune=lorra"], "tune"),
    ):
        assert main([*given, *wrong]) == ExitCode.USAGE, wrong
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_attention_decoder_is_tuned_beside_ctc(corpus: Path, saved: Path, tmp_path: Path) -> None:
    given = ["finetune", f"checkpoint={saved}", "task=sequence", "tune=adapter", "steps=20", "batch_seconds=6"]
    given += [f"manifest={corpus}/manifest.tsv", "corpora=tones", f"out={tmp_path / 'out'}", "data.workers=0", "beam=2"]
    assert main(given) == ExitCode.DONE
    found = json.loads((tmp_path / "out" / "results.json").read_text())["errors"]
    assert any("attention and CTC" in row["decoder"] for row in found)
