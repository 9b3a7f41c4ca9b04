"""Fine-tuning to a recogniser: runs of the training loop, their error rates, and the recognisers that they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import read_rows
from launch.cli.request import config_of
from launch.config import FinetuneJob
from launch.exit_codes import ExitCode
from launch.main import main
from launch.runs.metadata import run_config
from launch.workflows.finetuning import Made, training_job
from pretrain.evaluate.manifest import read_manifest
from pretrain.interop.init_weights import load_initial
from pretrain.models.encoders import transformer
from pretrain.train_module import build_model

QUICK = ["corpora=tones", "batch_seconds=6", "mask_time=0.2"]


def test_fine_tuning_learns_to_transcribe_tones(
    corpus: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["finetune", f"checkpoint={saved}", *QUICK, "frozen_steps=10", "lr=3e-3", "beam=8", "ngram=4"]
    given += [f"manifest={corpus}/manifest.tsv", f"out={out}", "data.workers=0", "train.checkpoint_every=100"]
    assert main([*given, "steps=130"]) == ExitCode.DONE
    found = json.loads((out / "results.json").read_text())
    by = {row["decoder"]: row for row in found["errors"]}
    assert set(by) == {"greedy", "beam 8", "beam 8 + 4-gram"}
    assert all(row["utterances"] == 18 for row in by.values())
    assert by["beam 8 + 4-gram"]["wer"] < 0.7
    assert "beam 8 + 4-gram" in capsys.readouterr().out
    assert (out / "checkpoints" / "step_00000130" / "model.safetensors").exists()
    assert list((out / "tb").iterdir())

    given = ["evaluate", f"checkpoint={out}", "task=asr", "corpora=tones", f"manifest={corpus}/manifest.tsv"]
    given += [f"out={tmp_path / 'rates'}", "asr.beam=8", "asr.ngram=4", f"runs={tmp_path}", "name=asr"]
    assert main(given) == ExitCode.DONE
    rates = {row["measure"]: row for row in json.loads((tmp_path / "rates" / "results.json").read_text())}
    assert len(rates) == 6
    for decoder, row in by.items():
        assert rates[f"word error rate, {decoder}"]["value"] == pytest.approx(row["wer"])
        assert rates[f"character error rate, {decoder}"]["value"] == pytest.approx(row["cer"])
    assert all(row["low"] <= row["value"] <= row["high"] for row in rates.values())
    assert "out (step 130)" in rates["word error rate, greedy"]["who"]
    capsys.readouterr()

    test = [u for u in read_manifest(corpus / "manifest.tsv") if u.split == "test"]
    files = ",".join(str(u.path) for u in test)
    given = ["transcribe", f"checkpoint={out}", f"files=[{files}]", "decoder=beam", "beam=8"]
    assert main([*given, "format=json"]) == ExitCode.DONE
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == [u.name for u in test]
    wrong = sum(row["text"] != u.text for row, u in zip(rows, test, strict=True)) / len(test)
    assert wrong == pytest.approx(by["beam 8"]["wer"], abs=1e-6)
    words = [word for row in rows for word in row["words"]]
    assert words
    assert all(0.0 <= word["start"] < word["end"] <= 0.6 for word in words)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_under_deepspeed_fine_tune_as_plain_torch_does(corpus: Path, saved: Path, tmp_path: Path) -> None:
    given = ["finetune", f"checkpoint={saved}", *QUICK, "frozen_steps=3", "steps=6", "beam=0", "ngram=0", "lr=3e-3"]
    given += [f"manifest={corpus}/manifest.tsv", "data.workers=0", "data.micro_batches=2", "train.media_every=0"]
    losses = {}
    for name, engine, ranks in (("one", "torch", 1), ("zero2", "deepspeed", 2), ("zero3", "deepspeed", 2)):
        more = [f"engine.name={engine}", f"launcher.processes={ranks}", f"engine.zero_stage={name[-1]}"]
        assert main([*given, f"out={tmp_path / name}", *more[: 3 if ranks > 1 else 2]]) == ExitCode.DONE
        losses[name] = [row["loss/text"] for row in read_rows(tmp_path / name / "metrics.jsonl")]
        assert "errors" in json.loads((tmp_path / name / "results.json").read_text())
    assert len(losses["one"]) == 6
    for name in ("zero2", "zero3"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-4)


def test_a_hugging_face_model_can_be_fine_tuned(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
    )  # fmt: skip
    transformers.Wav2Vec2Model(tiny).save_pretrained(tmp_path / "hub")
    given = [f"checkpoint={tmp_path / 'hub'}", *QUICK, f"out={tmp_path / 'out'}"]
    job = training_job(config_of("finetune", FinetuneJob, given), Made("", 6.0), ["encoder.layer_drop=0.25"])
    assert (job.frontend.name, job.encoder.dim, job.heads["text"].name) == ("waveform_conv", 32, "ctc")
    assert isinstance(job.encoder, transformer.Config)
    assert job.encoder.layer_drop == 0.25
    run = run_config(job)
    taken = load_initial(run, build_model(run))
    assert [name for name in taken.made if not name.startswith("heads.text.")] == []


def test_fields_of_the_command_and_of_the_run_are_told_apart(
    corpus: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["finetune", f"checkpoint={saved}", *QUICK, f"manifest={corpus}/manifest.tsv", f"out={tmp_path / 'out'}"]
    assert main([*given, "--dry-run", "train.log_every=10"]) == ExitCode.DONE
    assert "launch.workers.rank" in capsys.readouterr().out
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"
    for wrong, said in (
        ("train.log_evry=1", "did you mean train.log_every?"),
        ("stepps=5", "did you mean steps?"),
        ("encoder=conformer", "front end and encoder are those of the checkpoint"),
        ("data.micro_batches=20", "less than one segment"),
    ):
        assert main([*given, wrong]) == ExitCode.USAGE, wrong
        assert said in " ".join(capsys.readouterr().err.split())
