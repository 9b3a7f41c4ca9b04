"""Duplicate detection: recordings match across gain, codec and offset, in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import soxr

from data_pipeline.audio import codecs
from data_pipeline.preprocess import duplicate_search
from data_pipeline.preprocess.duplicate_search import DedupConfig, Match, Table, equal_hashes, shared_prints
from data_pipeline.preprocess.fingerprints import BITS, HOP, RATE, Fingerprinter
from tests.support.sounds import sound


def pairs_of(matches: Iterable[Match]) -> set[tuple[int, int]]:
    return {(match.one, match.other) for match in matches}


def table(owners: list[int], keys: list[np.ndarray], frames: list[np.ndarray]) -> Table:
    columns = [pa.array(keys, pa.list_(pa.uint64())), pa.array(frames, pa.list_(pa.uint32()))]
    return np.array(owners, np.uint32), columns


def corpus(recordings: int, prints: int, doubles: int, batch: int = 5_000) -> Iterator[Table]:
    """Random keys; each of the last `doubles` recordings repeats a fifth of an early one, nine frames later."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 1 << 2 * BITS, (doubles, prints))
    for start in range(0, recordings, batch):
        owners = np.arange(start, min(start + batch, recordings))
        keys = rng.integers(0, 1 << 2 * BITS, (len(owners), prints))
        for place in np.flatnonzero(owners < doubles):
            keys[place] = first[owners[place]]
        for place in np.flatnonzero(owners >= recordings - doubles):
            heard = rng.choice(prints - 9, prints // 5, replace=False)
            keys[place][heard] = first[owners[place] - recordings + doubles][heard + 9]
        yield table(owners.tolist(), list(keys), [np.arange(prints)] * len(keys))


def found_of(recordings: int, prints: int, doubles: int, folder: Path) -> tuple[float, int]:
    """Returns (share of the planted pairs that are found, number of false pairs)."""
    pairs = pairs_of(shared_prints(corpus(recordings, prints, doubles), recordings, DedupConfig(near=True), folder))
    planted = {(number, recordings - doubles + number) for number in range(doubles)}
    return len(pairs & planted) / doubles, len(pairs - planted)


def test_all_planted_pairs_and_no_others_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicate_search, "FILES", 3)
    assert found_of(3_000, 60, 50, tmp_path) == (1.0, 0)
    assert not list(tmp_path.iterdir()), "scratch files are removed"


def test_all_copies_of_a_recording_refer_to_the_first(tmp_path: Path) -> None:
    keys, frames = np.arange(10) * 977, np.arange(10)
    pairs = pairs_of(
        shared_prints([table(list(range(300)), [keys] * 300, [frames] * 300)], 300, DedupConfig(), tmp_path)
    )
    assert {(0, other) for other in range(1, 300)} <= pairs


def test_recordings_with_equal_hashes_refer_to_the_first(tmp_path: Path) -> None:
    hashes = [f"{number % 4:064x}" for number in range(10)]
    tables = [(np.array([9 - n], np.uint32), [pa.array([hashes[9 - n]])]) for n in range(10)]
    assert dict(equal_hashes(tables, 10, tmp_path)) == {4: 0, 5: 1, 6: 2, 7: 3, 8: 0, 9: 1}


def degraded(wave: codecs.Wave) -> dict[str, codecs.Wave]:
    """Returns the same speech with the degradations typical of copies in other corpora."""
    pcm = codecs.to_int16(wave)
    mp3 = io.BytesIO()
    soundfile.write(mp3, wave, 16_000, format="MP3")
    late = codecs.encode(codecs.to_int16(0.4 * wave[5_037:]), 16_000, "opus")
    return {
        "gain": (0.3 * pcm).astype(np.int16).astype(np.float32) / 32_768,
        "opus": soundfile.read(io.BytesIO(codecs.encode(pcm, 16_000, "opus")), dtype="float32")[0],
        "mp3": soundfile.read(io.BytesIO(mp3.getvalue()), dtype="float32")[0],
        "offset": wave[8_123:],
        "telephone": soxr.resample(soxr.resample(wave, 16_000, 8_000), 8_000, 16_000),
        "opus, quieter, later": soundfile.read(io.BytesIO(late), dtype="float32")[0],
    }


def matches_of(waves: list[list[codecs.Wave]], folder: Path, **config: float) -> list[Match]:
    keys, frames = [], []
    for parts in waves:
        prints = Fingerprinter()
        prints.feed(np.concatenate(parts))
        for kept, made in zip((keys, frames), prints.finish(), strict=True):
            kept.append(made)
    tables = [table(list(range(len(waves))), keys, frames)]
    matches = shared_prints(tables, len(waves), DedupConfig(near=True, **config), folder)
    return sorted(matches, key=lambda match: (match.one, match.other))


@pytest.mark.parametrize(("place", "seconds"), [("begin", 3.0), ("end", 3.0), ("both ends", 3.0), ("begin", 8.0)])
def test_a_shared_jingle_does_not_make_recordings_duplicates(tmp_path: Path, place: str, seconds: float) -> None:
    jingle = sound("jingle", seconds)
    episodes = [
        [jingle] * (place != "end") + [sound(f"episode {number}", 30.0)] + [jingle] * (place != "begin")
        for number in range(4)
    ]
    assert matches_of(episodes, tmp_path) == []
    found = matches_of(episodes, tmp_path, min_share=0.02)
    assert len(found) == 6
    assert all(match.share < 0.45 for match in found), "the share is measured in seconds of the shorter recording"


def test_the_overlap_share_and_offset_of_a_copy_are_reported(tmp_path: Path) -> None:
    one, more = sound("one", 20.0), sound("more", 20.0)
    [inside] = matches_of([[one], [one[16_000 * 6 : 16_000 * 14]]], tmp_path)
    assert inside.share > 0.9, "the whole shorter recording"
    assert -inside.shift * HOP / RATE == pytest.approx(6.0, abs=0.1)
    [half] = matches_of([[one, more], [sound("other", 10.0), one[: 16_000 * 15]]], tmp_path)
    assert half.share == pytest.approx(15 / 25, abs=0.1)
    assert -half.shift * HOP / RATE == pytest.approx(-10.0, abs=0.1)


@pytest.mark.real_speech
def test_degraded_copies_of_real_speech_are_found(utterances: list[Path], tmp_path: Path) -> None:
    names, keys, frames = [], [], []
    for path in utterances[:8]:
        wave = np.concatenate(list(codecs.decode(str(path), 16_000)))
        for kind, version in {"": wave, **degraded(wave)}.items():
            prints = Fingerprinter()
            prints.feed(version)
            names.append((path.name, kind))
            for kept, made in zip((keys, frames), prints.finish(), strict=True):
                kept.append(made)
    tables = [table(list(range(len(names))), keys, frames)]
    pairs = pairs_of(shared_prints(tables, len(names), DedupConfig(near=True), tmp_path))
    assert all(names[one][0] == names[other][0] for one, other in pairs), "different recordings were matched"
    wanted = {(number - number % 7, number) for number in range(len(names)) if number % 7}
    missed = [names[other] for _, other in wanted - pairs]
    print(f"found {1 - len(missed) / len(wanted):.3f} of {len(wanted)}, missed {missed}")
    assert len(missed) <= 0.05 * len(wanted)
