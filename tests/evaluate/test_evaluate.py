"""`auricle evaluate`, from a manifest and a checkpoint to a table of results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.main import main
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.evaluate.config import EvaluateConfig, NeuralConfig, ProbeConfig, SupervisedConfig
from pretrain.evaluate.evaluator import evaluate
from pretrain.evaluate.frozen_encoders import FrozenEncoder, open_encoder
from pretrain.evaluate.hf_encoder import HuggingFaceModel
from pretrain.evaluate.manifest import Utterance
from pretrain.evaluate.task_data import divide
from pretrain.evaluate.tasks import open_task
from tests.support.tones import PITCHES
from tests.support.training import save


def settings(corpus: Path, given: Path, task: str, **more: object) -> EvaluateConfig:
    values: dict[str, object] = {"corpora": "tones", "phones": "phones.tsv", "seeds": 2, "bootstrap": 100} | more
    probe = ProbeConfig(iterations=30, l2=(1e-3,), least_speakers=1)
    supervised = SupervisedConfig(epochs=2, batch_seconds=6)
    neural = NeuralConfig(epochs=2, batch=64)
    return EvaluateConfig(
        checkpoint=str(given), task=task, manifest=str(corpus / "manifest.tsv"), probe=probe, supervised=supervised,
        neural=neural, **values,
    )  # fmt: skip


def test_phone_classification_reports_all_baselines(corpus: Path, saved: Path) -> None:
    torch.set_num_threads(1)
    rows = evaluate(settings(corpus, saved, "phones"), say=lambda line: None)
    by = {(row.measure, row.who.split(" (")[0]): row for row in rows}
    network = "log-mel ±10 frames, network as large as run"
    for who in ("log-mel ±10 frames", network, "random weights", "supervised from scratch"):
        assert ("non-silence frames", who) in by
    assert by["non-silence frames", "log-mel ±10 frames"].value > 0.9
    ours = by["non-silence frames", "run"]
    assert ours.over_log_mel is not None
    assert ours.over_random is not None
    gap = ours.value - by["non-silence frames", "log-mel ±10 frames"].value
    assert ours.over_log_mel[0] == pytest.approx(gap)
    # a third of each clip is silence, which counts in "all frames" only
    everything = by["all frames", "log-mel ±10 frames"]
    assert everything.value > 0.8


def test_the_command_prints_and_writes_results(
    corpus: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "corpora=tones",
        "seeds=1",
        "bootstrap=100",
        "supervised.epochs=0",
        "neural.epochs=0",
        f"manifest={corpus}/manifest.tsv",
    ]
    options += ["phones=phones.tsv", "probe.iterations=20", f"out={tmp_path / 'out'}"]
    assert main(["evaluate", f"checkpoint={saved}", "task=keywords,rankme,abx,pnmi", *options]) == 0
    assert "random weights" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["task"] for row in rows} == {"keywords", "rankme", "abx", "pnmi"}
    assert all(0 <= row["value"] <= 1 for row in rows if row["task"] in ("abx", "pnmi", "keywords"))
    assert (tmp_path / "out" / "results.md").read_text().startswith("| task |")


def test_speakers_are_evaluated_by_probe_and_by_verification(corpus: Path, saved: Path) -> None:
    rows = evaluate(settings(corpus, saved, "speaker", seeds=1), say=lambda line: None)
    assert {row.measure for row in rows} == {"accuracy", "EER of verification"}
    assert all(0.0 <= row.value <= 1.0 for row in rows)


def test_validation_speakers_are_verified_alone(corpus: Path, saved: Path) -> None:
    """The corpus has one of them, who has no pairs with another one; those of the test are not used instead."""
    rows = evaluate(settings(corpus, saved, "speaker", seeds=1, ask="valid"), say=lambda line: None)
    assert {row.measure for row in rows} == {"accuracy"}


def test_following_a_run_writes_to_its_tensorboard(corpus: Path, saved: Path) -> None:
    (saved / "config.json").write_text("{}")
    options = ["corpora=tones", "seeds=1", "bootstrap=100", f"manifest={corpus}/manifest.tsv", "probe.iterations=20"]
    options += ["phones=phones.tsv"]
    assert main(["evaluate", f"checkpoint={saved}", "task=keywords", "follow=true", *options]) == 0
    (saved / "config.json").unlink()
    (line,) = (saved / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "keywords/accuracy"
    assert json.loads(line)["step"] == 4
    assert list((saved / "tb" / "evaluate").glob("events.*"))
    rows = [
        line.split("\t") for line in next((saved / "tb").glob("evaluate/*/*/metadata.tsv")).read_text().splitlines()
    ]
    assert rows[0] == ["phone", "speaker", "language", "utterance", "second"]
    assert {row[0] for row in rows[1:]} == set(PITCHES)
    assert {row[1] for row in rows[1:]} == {"speaker3"}


@pytest.fixture
def follow(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Returns a function that follows tmp_path/run and returns the steps in its evaluations.jsonl."""
    monkeypatch.setattr("launch.workers.programs.following.POLL_SECONDS", 0.05)
    options = ["task=keywords", "follow=true", "corpora=tones", "seeds=1", "bootstrap=100", "probe.iterations=2"]
    options += [f"manifest={corpus}/manifest.tsv", "phones=phones.tsv", f"checkpoint={tmp_path / 'run'}"]

    def follow(*more: str) -> list[int]:
        (tmp_path / "run" / "config.json").write_text("{}")
        assert main(["evaluate", *options, *more]) == 0
        lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    return follow


def test_each_checkpoint_of_a_followed_run_is_evaluated_once(
    follow: Callable[..., list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", 1, 2, 3, 4)
    assert follow("every=2") == [2, 4]
    assert follow() == [2, 4, 1, 3]
    assert "all 4 steps are done" in capsys.readouterr().out


def test_a_task_added_later_is_evaluated_on_checkpoints_done_before(
    follow: Callable[..., list[int]], tmp_path: Path
) -> None:
    save(tmp_path / "run", 2, 4)
    assert follow() == [2, 4]
    follow("task=keywords,rankme")
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    seen = [(row["step"], row["task"]) for row in map(json.loads, lines)]
    assert [seen.count((step, "keywords")) for step in (2, 4)] == [1, 1]
    assert {(2, "rankme"), (4, "rankme")} < set(seen)


def test_a_task_of_a_file_is_evaluated_once(follow: Callable[..., list[int]], tmp_path: Path) -> None:
    save(tmp_path / "run", 2, 4)
    (tmp_path / "pitches.yaml").write_text("kind: utterances\n")
    assert follow(f"task={tmp_path / 'pitches.yaml'}") == [2, 4]
    assert follow(f"task={tmp_path / 'pitches.yaml'}") == [2, 4]


def test_repeated_steps_are_evaluated_again(follow: Callable[..., list[int]], tmp_path: Path) -> None:
    save(tmp_path / "run", 2, 4)
    follow()
    save(tmp_path / "run", 4, seed=1)
    assert follow() == [2, 4, 4]


def test_following_ends_when_the_run_has_died(
    follow: Callable[..., list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", 2)
    assert follow("follow_minutes=0.001") == [2]
    assert "no heartbeat for follow_minutes=0.001" in capsys.readouterr().out
    (tmp_path / "run" / "UNHEALTHY").write_text("loss is NaN")
    assert follow() == [2]
    assert "stopped as unhealthy" in capsys.readouterr().out


def test_a_checkpoint_removed_before_it_is_read_is_skipped(
    follow: Callable[..., list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", 2, 4)

    def gone(given: str, device: str) -> FrozenEncoder:
        if given.endswith("2"):
            shutil.rmtree(given)
        return open_encoder(given, device)

    monkeypatch.setattr("pretrain.evaluate.frozen_encoders.open_encoder", gone)
    assert follow() == [4]


def test_all_models_are_moved_to_the_device(corpus: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, to = [], torch.nn.Module.to

    def noted(module: torch.nn.Module, *given: object) -> torch.nn.Module:
        moved.append(given)
        return to(module, "cpu")

    monkeypatch.setattr(torch.nn.Module, "to", noted)
    evaluate(settings(corpus, saved, "keywords", seeds=1, device="cpu:0"), say=lambda line: None)
    assert moved == [("cpu:0",)] * 3  # the checkpoint, random weights, and the supervised baseline


def test_pnmi_leaves_out_silence(corpus: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []

    def noted(labels: np.ndarray, units: np.ndarray) -> tuple[float, float, float]:
        seen.append(set(labels.tolist()))
        return 0.1 * len(seen), 0.0, 0.0

    monkeypatch.setattr("pretrain.evaluate.intrinsic.phone_normalized_mutual_information", noted)
    rows = evaluate(settings(corpus, saved, "pnmi"), say=lambda line: None)
    assert all(len(labels) == len(PITCHES) for labels in seen)  # a third of each clip is silence
    layers = (
        len(seen) - 1
    ) // 3  # one call for log-mel, then all layers for two seeds of random weights and the checkpoint
    (mean,) = (row.value for row in rows if row.who.startswith("random") and row.measure == "PNMI, layer 0")
    assert len(seen) == 1 + 3 * layers
    assert mean == pytest.approx(0.1 * (2 + 2 + layers) / 2)


def test_a_hugging_face_folder_is_evaluated_like_a_run(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    transformers.HubertModel(tiny).save_pretrained(tmp_path / "hub")
    encoder = open_encoder(str(tmp_path / "hub"))
    assert encoder.rate_hz == 50.0
    assert encoder.encode(torch.randn(16000)).shape == (3, 49, 32)
    rows = evaluate(settings(corpus, tmp_path / "hub", "keywords", seeds=1), say=lambda line: None)
    network = "log-mel ±10 frames, network as large as hub"
    beside = ["log-mel ±10 frames", "random weights (hub)", network, "supervised from scratch (hub)", "hub (step 0)"]
    assert [row.who for row in rows] == beside
    assert encoder.fresh is not None
    first, again, other = (
        encoder.fresh(seed).state_dict()["net.feature_projection.projection.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_in_half_precision_are_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    transformers.HubertModel(tiny).half().save_pretrained(tmp_path / "hub")
    encoder = open_encoder(str(tmp_path / "hub"))
    assert encoder.encode(torch.randn(16000)).dtype == torch.float32
    assert encoder.fresh is not None
    assert {weight.dtype for weight in encoder.fresh(0).parameters()} == {torch.float32}


def test_padding_does_not_change_a_hugging_face_models_frames(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
    )  # fmt: skip
    model = HuggingFaceModel(transformers.HubertModel(tiny), normalize=True).eval()
    wave_BT = torch.randn(2, 16000)
    wave_BT[1, 9600:] = 0
    together = model(wave_BT, torch.tensor([16000, 9600]))
    alone = model(wave_BT[1:, :9600], torch.tensor([9600]))
    frames = int(alone.lengths_B[0])
    assert together.lengths_B.tolist() == [49, frames]
    assert torch.allclose(together.final.x_BFD[1, :frames], alone.final.x_BFD[0], atol=1e-4)


def test_invalid_tasks_checkpoints_and_corpora_are_reported(corpus: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such task"):
        evaluate(settings(corpus, saved, "fonemes"))
    with pytest.raises(ValueError, match="not a run folder with a checkpoint, a checkpoint"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="which has the corpora tones"):
        evaluate(settings(corpus, saved, "keywords", corpora="other"))


def test_validation_splits_exclude_the_test_speakers() -> None:
    """With ask=valid, no test utterance is used for fitting or evaluation, and no speaker is in two splits."""
    everyone = [
        Utterance("", f"{split}-{speaker}-{take}", f"{split}-{speaker}", corpus="speechocean762", split=split)
        for split, speakers in (("train", 12), ("valid", 2), ("test", 2))
        for speaker in range(speakers)
        for take in range(3)
    ]
    parts, _ = divide(open_task("phones"), everyone, 0, "valid")
    speakers = [{u.speaker for u in part} for part in parts]
    assert [len(found) for found in speakers] == [10, 2, 2]
    assert set().union(*speakers) == {u.speaker for u in everyone if u.split != "test"}
    assert speakers[2] == {"valid-0", "valid-1"}
