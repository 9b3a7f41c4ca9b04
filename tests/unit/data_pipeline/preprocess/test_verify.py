"""`verify` finds every missing, added or modified file of a data set."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.core.schema import load
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.kmeans import make_targets
from data_pipeline.preprocess.job import preprocess
from data_pipeline.preprocess.verify import verify
from tests.support.corrupt_shards import overwrite_member, replace_audio, silent_flac
from tests.support.sounds import many, path_config, write_corpus
from tests.support.tiny_shards import sounds, write_shards


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Makes a data set with every kind of file, and a set of labels."""
    root = tmp_path_factory.mktemp("verify")
    corpus = write_corpus(root / "corpus", many(6, 0.6))
    (corpus / "broken.wav").write_bytes(b"RIFF")
    (corpus / "nowhere.wav").symlink_to("nothing")
    preprocess(path_config(corpus, root / "out", shard_mb=0.03, dedup={"exact": True, "near": True}), progress=False)
    given = {"shards": str(root / "out"), "out": str(root / "labels"), "classes": 4, "rounds": 1}
    make_targets(load(TargetsConfig, given))
    return root / "out"


def every_file(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_a_freshly_written_data_set_has_no_faults(whole: Path) -> None:
    assert len(list(whole.glob("*.tar"))) > 1
    assert list(verify(str(whole))) == []
    assert list(verify(str(whole.parent / "labels"))) == []


def test_one_flipped_bit_in_each_file_is_found(whole: Path) -> None:
    kinds = set()
    for folder in (whole, whole.parent / "labels"):
        for name in every_file(folder):
            path = folder / name
            before = path.read_bytes()
            altered = bytearray(before)
            altered[len(before) // 2] ^= 4
            path.write_bytes(altered)
            assert list(verify(str(folder), decode=False)), name
            path.write_bytes(before)
            kinds.add(name.partition("/")[0] if "/" in name else name[name.find(".") :] if "-" in name else name)
    assert kinds >= {"_done", "_plan", "_rejects", "_scan", "dataset.json", "quarantine.jsonl", "report.html"}
    assert kinds >= {"checksums.json", ".tar", ".tar.idx", ".parquet", ".labels.parquet", "labels.json", "targets.json"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(whole: Path, data: st.DataObject) -> None:
    folder = data.draw(st.sampled_from([whole, whole.parent / "labels"]))
    name = data.draw(st.sampled_from(sorted(every_file(folder))))
    path = folder / name
    before = path.read_bytes()
    position = data.draw(st.integers(0, len(before) - 1))
    altered = bytearray(before)
    altered[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(altered)
    try:
        assert list(verify(str(folder), decode=False)), f"byte {position} of {name}"
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("ending", [".tar", ".tar.idx", ".parquet"])
def test_missing_and_unexpected_files_are_found(whole: Path, tmp_path: Path, ending: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    next(path for path in sorted(copy.iterdir()) if path.name.endswith(ending)).unlink()
    (copy / "stray.tar").write_bytes(bytes(1024))
    problems = dict(verify(str(copy)))
    assert len(problems) == 2
    assert "belongs to no finished unit" in problems["stray.tar"]


def test_every_fault_of_a_shard_is_listed(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", [sounds([0.5, 0.5, 0.5]), sounds([0.5, 0.5], corpus="b")])
    first = ["a-0000.flac", "a-0001.json", "a-0002.flac"]
    for name, content in zip(first, (b"not audio", b"{not json", b"fLaC\xff"), strict=True):
        overwrite_member(root / "shard-0000.tar", name, content)
    overwrite_member(root / "shard-0001.tar", "b-0001.flac", b"not audio")
    faults = list(verify(str(root)))
    for shard, names in (("shard-0000.tar", first), ("shard-0001.tar", ["b-0001.flac"])):
        mine = [fault for name, fault in faults if name == shard]
        assert [sum(name in fault for fault in mine) for name in names] == [1] * len(names)
        assert sum("checksum" in fault for fault in mine) == 1


@pytest.mark.parametrize("odd", ["record", "index", "tar"])
def test_an_unparsable_file_does_not_hide_other_faults(tmp_path: Path, odd: str) -> None:
    root = write_shards(tmp_path / "shards", [sounds([0.5, 0.5]), sounds([0.5], corpus="b")])
    overwrite_member(root / "shard-0001.tar", "b-0000.flac", b"not audio")
    file = {"record": "_done/shard-0000.json", "index": "shard-0000.parquet", "tar": "shard-0000.tar"}[odd]
    (root / file).write_bytes(b"[" * 3000)
    faults = list(verify(str(root)))
    assert any("b-0000.flac" in fault for _, fault in faults), "the second shard is verified too"
    assert any(name in (file, "shard-0000.tar") for name, _ in faults)


def test_a_wrong_length_in_the_index_allocates_no_memory(tmp_path: Path) -> None:
    hours = 2
    root = write_shards(tmp_path / "shards", [sounds([1.0])])
    replace_audio(root, "shard-0000", silent_flac(hours * 3600))
    tracemalloc.start()
    faults = list(verify(str(root)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, f"{peak / 1e6:.0f} MB for {hours} hours of audio"
    assert any("decodes to more than 16000 samples" in fault for _, fault in faults)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished shards"):
        list(verify(str(tmp_path)))
