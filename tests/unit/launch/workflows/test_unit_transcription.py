"""`auricle transcribe` with a head that writes the text of units."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import save

from data_pipeline.core.schema import ConfigError
from data_pipeline.labels.features import kaldi_mfcc
from data_pipeline.labels.kmeans import KMEANS
from data_pipeline.labels.store import LabelMetadata
from data_pipeline.labels.unit_labels import open_labeller
from data_pipeline.text.tokenizer import write_tokens
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.generation.unit_reader import open_reader, reads_units
from pretrain.inference.sampling import NoEndError
from tests.support.contract_cases import HEADS, speech_like
from tests.support.training import save as save_run


def write_units(folder: Path, features: str = "mfcc") -> None:
    """Writes a label folder whose centres are some frames of a recording."""
    import hashlib

    folder.mkdir()
    centres = np.ascontiguousarray(kaldi_mfcc().compute(speech_like(1.0, 0).numpy())[::8][:12])
    content = save({"centres": centres})
    (folder / KMEANS).write_bytes(content)
    (folder / "targets.json").write_text(json.dumps({"features": features}))
    LabelMetadata(hashlib.sha256(content).hexdigest(), 100, 12).write(str(folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    write_units(folder / "labels")
    symbols = [*" ',abcdefghijklmnopqrstuvwxyz"]
    write_tokens(str(folder / "tokens"), {"kind": "characters", "label": "text", "case": "lower", "symbols": symbols})
    places = {"tokens": {"text": str(folder / "tokens")}, "targets": {"level_0": str(folder / "labels")}}
    data = {"shards": "synthetic", "micro_batches": 4} | places
    for name, kind in (("reads", "units, to text"), ("speaks", "units")):
        save_run(folder / name, 4, data=data, heads={"voice": HEADS[kind] | {"vocabulary": len(symbols)}})
    return folder


def test_recordings_are_labelled_by_the_nearest_centre(runs: Path) -> None:
    label = open_labeller(str(runs / "labels"))
    wave_T = speech_like(1.0, 0).numpy()
    assert label(wave_T)[::8][:12].tolist() == list(range(12))
    assert label(wave_T[:300]).tolist() == []


def test_a_recording_becomes_text_with_times_or_is_listed_where_no_end_comes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(1.5, 0).numpy(), 16_000)
    out = tmp_path / "out"
    fields = [f"checkpoint={runs / 'reads'}", f"files={tmp_path / 'a.wav'}", f"out={out}", "format=json"]
    code = main(["transcribe", *fields])
    reader = open_reader(str(runs / "reads"))
    try:
        text = reader.text(speech_like(1.5, 0).numpy())
    except NoEndError:  # the weights are untrained
        assert code == ExitCode.FAILED
        assert "no_end" in (out / "rejects.jsonl").read_text()
        return
    assert code == ExitCode.DONE
    found = json.loads((out / "a.json").read_text())
    assert found["text"].split() == text.split()
    assert all(0 <= word["confidence"] <= 1 for word in found["words"])


def test_an_end_that_comes_gives_words_over_the_whole_recording(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(str(runs / "reads"))
    with torch.no_grad():
        reader.head.decoder.out.bias[reader.head.end] = 50.0
        reader.head.decoder.out.bias[1 + 3] = 40.0
        reader.head.length.weight.zero_()
        reader.head.length.bias.fill_(float(np.log(11)))
    symbols, log_prob = reader.read(speech_like(1.5, 0).numpy())
    assert len(symbols) == 3  # the fewest that 10 predicted letters allow
    assert log_prob < 0


def test_other_heads_and_units_of_other_features_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reads_units(str(runs / "reads"))
    assert not reads_units(str(runs / "reads"), "other")
    assert not reads_units(str(tmp_path))
    with pytest.raises(ConfigError, match="head voice writes units"):
        open_reader(str(runs / "speaks"))
    write_units(tmp_path / "labels", features="runs/base")
    with pytest.raises(ConfigError, match="holds labels of features=runs/base"):
        open_labeller(str(tmp_path / "labels"))
    (tmp_path / "labels" / "targets.json").write_text('{"features": "mfcc"}')
    (tmp_path / "labels" / KMEANS).write_bytes(save({"centres": np.zeros((12, 39), np.float32)}))
    with pytest.raises(ConfigError, match="is not that of its labels"):
        open_labeller(str(tmp_path / "labels"))
    soundfile.write(tmp_path / "a.wav", speech_like(1.0, 0).numpy(), 16_000)
    fields = [f"checkpoint={runs / 'reads'}", f"files={tmp_path / 'a.wav'}", "decoder=beam"]
    assert main(["transcribe", *fields]) == ExitCode.USAGE
    assert "decoder=beam: the head units writes the most probable letters" in " ".join(capsys.readouterr().err.split())
