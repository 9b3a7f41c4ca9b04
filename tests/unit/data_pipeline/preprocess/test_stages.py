"""Optional stages: voice activity detection, filters, loudness, deduplication, held-out speakers, weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.audio import codecs, vad
from data_pipeline.audio.quality import FilterConfig, measure_quality, normalised, reject_reason
from data_pipeline.audio.vad import VadConfig
from data_pipeline.core.schema import ConfigError
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.job import preprocess
from data_pipeline.shards.records import done_records, read_index
from tests.support.sounds import index_rows, many, path_config, sound, write_corpus


@pytest.fixture
def spoken(utterances: list[Path]) -> codecs.Wave:
    """Writes real speech: two utterances, each with two seconds of silence before and after."""
    pytest.importorskip("onnxruntime", reason="needs the extra vad")
    pytest.importorskip("silero_vad", reason="needs the extra vad")
    hush = np.zeros(32_000, np.float32)
    parts = [hush]
    for path in utterances[:2]:
        parts += [np.concatenate(list(codecs.decode(str(path), 16_000)))[: 16_000 * 6], hush]
    return np.concatenate(parts)


@pytest.mark.real_speech
def test_speech_probabilities_equal_those_of_silero_vad(spoken: codecs.Wave) -> None:
    import torch
    from silero_vad import load_silero_vad

    detector = vad.Detector()
    windows = [spoken[start : start + vad.WINDOW] for start in range(0, len(spoken) - vad.WINDOW + 1, vad.WINDOW)]
    mine = np.array([detector.probability(window) for window in windows])
    model = load_silero_vad(onnx=True)
    theirs = np.array([float(model(torch.from_numpy(window), 16_000)) for window in windows])
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.real_speech
@pytest.mark.parametrize("block", [700, 16_000, 10**7])
def test_speech_segments_do_not_depend_on_the_block_size(spoken: codecs.Wave, block: int) -> None:
    config = VadConfig(enabled=True)
    blocks = [spoken[start : start + block] for start in range(0, len(spoken), block)]
    found = list(vad.speech(blocks, 16_000 * 30, config))
    for start, wave in found:
        np.testing.assert_array_equal(wave, spoken[start : start + len(wave)])
    kept = sum(len(wave) for _, wave in found)
    assert 0.85 * (len(spoken) - 96_000) < kept < 1.05 * (len(spoken) - 96_000)
    assert found[0][0] >= 28_000, "leading silence is left out"
    ends = [start + len(wave) for start, wave in found]
    assert all(start >= end for (start, _), end in zip(found[1:], ends, strict=False)), "no overlap"
    short = list(vad.speech(blocks, 16_000, config))
    assert max(len(wave) for _, wave in short) <= 16_000
    assert sum(len(wave) for _, wave in short) > 0.9 * kept


def test_a_missing_vad_package_is_reported_before_the_job_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vad.importlib.util, "find_spec", lambda name: None)
    config = path_config(tmp_path, tmp_path / "out", vad={"enabled": True})
    with pytest.raises(ConfigError, match="pip install onnxruntime silero-vad"):
        preprocess(config)


def test_each_filter_reports_its_reason() -> None:
    config = FilterConfig(min_level_dbfs=-50.0, max_clipped=0.01, min_snr_db=15.0)
    good = sound("good", 2.0)
    noise = sound("noise", 2.0) * 0 + 0.1 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    named = {
        "": good,
        "silence": good * 1e-4,
        "clipped": np.clip(good * 20, -1, 1),
        "low_snr": noise,
    }
    assert {reason: reject_reason(measure_quality(wave, 16_000), config) for reason, wave in named.items()} == {
        reason: reason for reason in named
    }
    assert reject_reason(measure_quality(np.zeros(32_000, np.float32), 16_000), config) == "silence"


def test_estimated_snr_increases_with_the_true_snr() -> None:
    signal, noise = sound("signal", 4.0), np.random.default_rng(1).standard_normal(64_000).astype(np.float32)
    estimates = [measure_quality(signal + scale * noise, 16_000).snr_db for scale in (0.1, 0.03, 0.01, 0.003)]
    assert estimates == sorted(estimates)
    true = 10 * np.log10(np.square(signal[:6000]).mean() / 0.01**2)
    assert estimates[2] == pytest.approx(true, abs=3)


def test_loudness_reaches_the_target_but_never_clips() -> None:
    quiet = 0.01 * sound("quiet", 2.0)
    wave, gain = normalised(quiet, measure_quality(quiet, 16_000), -26.0)
    assert measure_quality(wave, 16_000).level_dbfs == pytest.approx(-26.0, abs=0.1)
    assert gain > 0
    quiet[5] = 0.9
    wave, gain = normalised(quiet, measure_quality(quiet, 16_000), -3.0)
    assert np.abs(wave).max() == pytest.approx(0.99, abs=1e-3)


@pytest.mark.usefixtures("local_ray")
def test_duplicates_are_left_out_and_listed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(6, 6.0))
    wave, _ = soundfile.read(corpus / "speaker0" / "clip000.flac", dtype="int16")
    soundfile.write(corpus / "zz_same.wav", wave, 16_000)
    soundfile.write(corpus / "zz_quiet.flac", (wave * 0.4).astype(np.int16), 16_000)
    (corpus / "zz_later.opus").write_bytes(codecs.encode(wave[8_123:], 16_000, "opus"))
    config = path_config(corpus, tmp_path / "out", dedup={"exact": True, "near": True})
    summary = preprocess(config, progress=False)
    assert (summary.segments, summary.rejects["dedup/exact"][0], summary.rejects["dedup/near"][0]) == (6, 1, 2)
    soundfile.write(corpus / "aa_again.aiff", wave, 16_000)
    later = preprocess(config, progress=False)
    assert (later.segments, later.rejects["dedup/exact"][0]) == (6, 2), "finished shards are kept"


@pytest.mark.usefixtures("local_ray")
def test_each_speaker_is_in_one_split_only(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {f"speaker{n % 20:02d}/{n}.flac": 0.6 for n in range(60)})
    config = path_config(corpus, tmp_path / "out", split={"valid": 0.2, "test": 0.2})
    summary = preprocess(config, progress=False)
    assert summary.segments == 60
    speakers = {
        name: {str(row["speaker"]) for row in index_rows(tmp_path / "out" / name)}
        for name in ("train", "valid", "test")
    }
    assert all(speakers.values())
    assert sum(map(len, speakers.values())) == len(set.union(*speakers.values())) == 20
    assert preprocess(config, progress=False).units_done == 0
    with pytest.raises(ValueError, match=r"its shards are in .*train"):
        done_records(str(tmp_path / "out"))


@pytest.mark.usefixtures("local_ray")
def test_weights_and_loudness_reach_the_index(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(3))
    values = {"loudness_dbfs": -26.0, "weights": {"corpus": 2.5}, "codec": "wav"}
    config: PreprocessConfig = path_config(corpus, tmp_path / "out", **values)
    preprocess(config, progress=False)
    assert {row["weight"] for row in index_rows(tmp_path / "out")} == {2.5}
    record = done_records(str(tmp_path / "out"))[0]
    row = read_index(str(tmp_path / "out"), record).to_pylist()[0]
    tar = (tmp_path / "out" / record.shard).read_bytes()
    wave, _ = soundfile.read(io.BytesIO(tar[row["payload_offset"] :][: row["payload_size"]]), dtype="float32")
    assert measure_quality(wave, 16_000).level_dbfs == pytest.approx(-26.0, abs=0.1)
