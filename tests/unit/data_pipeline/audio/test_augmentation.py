"""Augmentation drawn by segment key, and frame labels that stay aligned with the audio."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data_pipeline.audio.augmentation import AugmentConfig, Augmenter, mixed_part
from data_pipeline.audio.transforms import add_noise, change_speed, repeat_to_length, reverberate
from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import SAMPLE_RATE, Batch, Step
from data_pipeline.labels.store import LabelMetadata, write_labels
from data_pipeline.loader.reader import open_reader
from data_pipeline.loader.streaming import StreamReader
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import ShardError
from tests.support.tiny_shards import sounds, write_shards

BATCH = {"batch_seconds": 8.0, "micro_batches": 4, "min_seconds": 0.3, "max_seconds": 1.6}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = np.random.default_rng(0).uniform(0.4, 2.2, 120).tolist()
    everything = sounds(lengths)
    return write_shards(tmp_path_factory.mktemp("shards"), [everything[i::4] for i in range(4)])


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(1)
    soundfile.write(folder / "hum.wav", np.sin(np.arange(8000) / 8).astype(np.float32) * 0.1, 16_000)
    soundfile.write(folder / "hiss.flac", (rng.standard_normal(4000) * 0.1).clip(-1, 1), 8_000)
    return folder


def read(root: Path, count: int, rank: int = 0, world: int = 1, **values: object) -> list[Step]:
    reader = open_reader(DataConfig(**{"shards": str(root), "workers": 0, **BATCH, **values}), 7, rank, world)  # type: ignore[arg-type]
    try:
        return list(itertools.islice(reader.steps(), count))
    finally:
        reader.close()


def power(wave: np.ndarray) -> float:
    return float(np.mean(np.square(wave, dtype=np.float64)))


def test_augmented_audio_does_not_depend_on_ranks_or_workers(corpus: Path, recordings: Path) -> None:
    augment = AugmentConfig(
        speeds=(0.9, 1.0, 1.1), rir=str(recordings), rir_prob=0.5, mix_prob=0.5, noise=str(recordings), noise_prob=0.5,
        gain_db=(-6.0, 6.0),
    )  # fmt: skip
    alone, plain = read(corpus, 4, augment=augment), read(corpus, 4)
    ranks = [read(corpus, 4, rank, 2, augment=augment, workers=2) for rank in range(2)]
    changed = 0
    for g, step in enumerate(alone):
        for j, batch in enumerate(step.batches):
            other = ranks[j % 2][g].batches[j // 2]
            assert batch.keys == other.keys
            assert torch.equal(batch.wave_BT, other.wave_BT)
            assert torch.equal(batch.lengths_B, other.lengths_B)
            assert batch.keys == plain[g].batches[j].keys
            assert batch.wave_BT.shape[1] <= plain[g].batches[j].wave_BT.shape[1]
            assert torch.isfinite(batch.wave_BT).all()
            for wave, length in zip(batch.wave_BT, batch.lengths_B.tolist(), strict=True):
                assert not wave[length:].any()
            changed += batch.wave_BT.shape != plain[g].batches[j].wave_BT.shape or not torch.equal(
                batch.wave_BT, plain[g].batches[j].wave_BT
            )
    assert changed == 16


def test_noise_is_mixed_at_the_configured_snr() -> None:
    rng = np.random.default_rng(0)
    wave, noise = rng.standard_normal(16000).astype(np.float32), rng.standard_normal(300).astype(np.float32)
    added = add_noise(wave, repeat_to_length(noise, 16000, rng), 10.0) - wave
    assert 10 * np.log10(power(wave) / power(added)) == pytest.approx(10, abs=0.1)
    assert np.array_equal(add_noise(wave, np.zeros(16000, np.float32), 0.0), wave)


def test_reverberation_keeps_the_power_and_adds_no_delay() -> None:
    wave = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    tap = np.zeros(100, np.float32)
    tap[30] = 0.5
    assert reverberate(wave, tap) == pytest.approx(wave, abs=1e-5)
    room = np.exp(-np.arange(2000) / 300).astype(np.float32)
    assert power(reverberate(wave, room)) == pytest.approx(power(wave), rel=1e-3)


def test_speed_perturbation_shifts_a_tone_and_keeps_the_length() -> None:
    tone = np.sin(2 * np.pi * 400 * np.arange(17600) / SAMPLE_RATE).astype(np.float32)
    fast = change_speed(tone, 1.1, 16000)
    assert len(fast) == 16000
    spectrum = np.abs(np.fft.rfft(fast))
    assert np.argmax(spectrum) == pytest.approx(440, abs=1)


def test_mixing_changes_at_most_the_configured_share() -> None:
    rng = np.random.default_rng(0)
    wave, other = rng.standard_normal(8000).astype(np.float32), rng.standard_normal(9000).astype(np.float32)
    for _ in range(20):
        assert len(np.flatnonzero(mixed_part(wave, other, 0.0, (0.0, 0.5), rng))) <= 4000
        assert len(np.flatnonzero(mixed_part(wave, other, 0.0, (0.25, 0.5), rng))) >= 2000


MIXED = {"augment": AugmentConfig(mix_prob=1.0, mix_share=1.0, mix_least_share=0.5, gain_db=(-3.0, 3.0))}


@pytest.mark.parametrize("sources", [2, 3])
def test_mixtures_are_the_sum_of_their_parts_on_any_number_of_ranks(corpus: Path, sources: int) -> None:
    alone = read(corpus, 2, sources=sources, batch_seconds=24.0, **MIXED)
    ranks = [read(corpus, 2, rank, 2, sources=sources, batch_seconds=24.0, workers=2, **MIXED) for rank in range(2)]
    mixed = 0
    for g, step in enumerate(alone):
        for j, batch in enumerate(step.batches):
            parts_BST = batch.sources_BST
            assert parts_BST is not None
            assert parts_BST.shape == (len(batch.keys), sources, batch.wave_BT.shape[1])
            found = ranks[j % 2][g].batches[j // 2].sources_BST
            assert found is not None
            assert torch.equal(parts_BST, found)
            for wave_T, parts_ST, length in zip(batch.wave_BT, parts_BST, batch.lengths_B.tolist(), strict=True):
                assert not parts_ST[:, length:].any()
                if parts_ST.any():
                    torch.testing.assert_close(parts_ST.sum(0).clamp(-1, 1), wave_T, rtol=0, atol=1e-6)
                    assert parts_ST.any(1).all()
                    mixed += 1
    assert mixed > 8


def test_a_mixture_without_a_partner_has_silent_parts_and_stays_as_it_is() -> None:
    config = AugmentConfig(mix_prob=1.0)
    wave = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 0.1
    found = Augmenter(config, sources=3).apply(wave, [wave[:3000]], np.random.default_rng(1))
    assert np.array_equal(found.wave, wave)
    assert not found.sources.any()
    seldom = Augmenter(AugmentConfig(mix_prob=1e-9), sources=2).apply(wave, [], np.random.default_rng(1))
    assert np.array_equal(seldom.sources[0], wave)
    assert not seldom.sources[1].any()


def test_parts_of_a_mixture_are_of_other_segments_and_other_speakers(tmp_path: Path) -> None:
    content = sounds([1.0] * 12, speaker="ann") + sounds([1.0] * 3, corpus="b", speaker="bob")
    write_shards(tmp_path, [content])
    whole = {"micro_batches": 1, "batch_seconds": 15.0}
    clean = dict(by_key(read(tmp_path, 1, **whole)[0].batches[0]))
    speaker = {sound.key: sound.speaker for sound in content}
    mixed = 0
    [batch] = read(tmp_path, 1, sources=2, labels=("speaker",), **whole, **MIXED)[0].batches
    assert batch.sources_BST is not None
    for key, (_, other_T) in zip(batch.keys, batch.sources_BST, strict=True):
        heard = [name for name, wave_T in clean.items() if contains(wave_T, other_T)]
        assert {speaker[name] for name in heard} == {"bob" if speaker[key] == "ann" else "ann"}
        mixed += 1
    assert mixed >= 12


def by_key(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    return list(zip(batch.keys, batch.wave_BT, strict=True))


def contains(wave_T: torch.Tensor, part_T: torch.Tensor) -> bool:
    """Returns whether a part is a stretch of the wave, at any level and position."""
    size = 1 << (2 * len(wave_T)).bit_length()
    products = torch.fft.irfft(torch.fft.rfft(wave_T, size) * torch.fft.rfft(part_T, size).conj(), size)
    return bool(products.abs().max() > 0.5 * wave_T.norm() * part_T.norm())


def test_sources_without_mixtures_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sources=2: needs mixtures; set augment\.mix_prob"):
        load(DataConfig, {"shards": "x", "sources": 2})
    streamed = load(DataConfig, {"shards": "x", "sources": 2, "augment": {"mix_prob": 1.0}, "reader": "webdataset"})
    with pytest.raises(ConfigError, match=r"data\.sources needs an index of the shards"):
        StreamReader(streamed, 0, 0, 1)


def test_invalid_augmentation_configs_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.noise_prob=0\.5 needs audio files"):
        Augmenter(AugmentConfig(noise_prob=0.5, noise=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"between 0\.5 and 2"):
        Augmenter(AugmentConfig(speeds=(3.0,)))
    with pytest.raises(ConfigError, match="gain_db"):
        Augmenter(AugmentConfig(gain_db=(3.0, 1.0)))
    with pytest.raises(ConfigError, match=r"mix_least_share=0\.7: must be at most data\.augment\.mix_share=0\.5"):
        Augmenter(AugmentConfig(mix_least_share=0.7))


def write_units(root: Path, corpus: Path, artefact: str = "k1") -> LabelMetadata:
    """Writes labels that equal the index of their frame in the segment."""
    import pyarrow.parquet as pq

    labels = LabelMetadata(artefact, 50, 200)
    labels.write(str(root))
    for index in sorted(corpus.glob("*.parquet")):
        table = pq.read_table(index)
        rows = [np.arange(n // labels.hop) for n in table.column("n_samples").to_pylist()]
        write_labels(str(root), f"{index.stem}.tar", labels, table.column("key").to_pylist(), rows)
    return labels


def test_frame_labels_follow_the_crop(corpus: Path, tmp_path: Path) -> None:
    labels = write_units(tmp_path, corpus)
    steps = read(corpus, 12, targets={"units": str(tmp_path)}, workers=2)
    cropped = 0
    for batch in (batch for step in steps for batch in step.batches):
        units = batch.targets["units"]
        assert units.dtype == torch.int64
        for row, length in zip(units, batch.lengths_B.tolist(), strict=True):
            valid = row[row >= 0]
            assert abs(len(valid) - length / labels.hop) <= 1
            assert torch.equal(valid, torch.arange(int(valid[0]), int(valid[0]) + len(valid)))
            cropped += int(valid[0]) > 0
    assert cropped > 5


def test_labels_of_another_artefact_or_corpus_are_rejected(corpus: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_units(first, corpus)
    write_units(second, corpus, "k2")
    hashes = [
        open_reader(DataConfig(shards=str(corpus), workers=0, targets={"u": str(root)}, **BATCH), 0, 0, 1).plan_hash  # type: ignore[arg-type]
        for root in (first, second)
    ]
    assert hashes[0] != hashes[1]
    for path in second.glob("*.parquet"):
        path.rename(first / path.name)
    with pytest.raises(ShardError, match="its labels are of artefact 'k2'"):
        read(corpus, 1, targets={"u": str(first)})
    with pytest.raises(ConfigError, match="has no frame labels"):
        read(corpus, 1, targets={"u": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="away from the frame labels"):
        read(corpus, 1, targets={"u": str(second)}, augment=AugmentConfig(speeds=(0.9, 1.1)))
