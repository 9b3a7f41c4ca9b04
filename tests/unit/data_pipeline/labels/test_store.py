"""labels.json and label files with damaged content or wrong values: the error names file and field."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.labels.store import LabelMetadata, LabelReader, file_name, require_same_settings, write_labels
from data_pipeline.shards.local import ShardError, ShardFiles, ShardSet
from data_pipeline.shards.records import done_records
from tests.support.tiny_shards import sounds, write_shards

DAMAGED = [b"", b'{"artefact": "to', b"\xff\xfe", b"[]", b"null", b"[" * 10**5, b"{\0}"]
GOOD: dict[str, Any] = {"artefact": "k1", "rate_hz": 50, "classes": 3}


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:12]))
def test_damaged_json_of_a_label_folder_is_no_config_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels.json").write_bytes(content)
    (tmp_path / "targets.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"{tmp_path}/labels\.json: .*run `auricle targets` again"):
        LabelMetadata.read(str(tmp_path))
    with pytest.raises(DamagedFileError, match=rf"{tmp_path}/targets\.json: .*give the command again"):
        require_same_settings(FileStore(str(tmp_path)), {"classes": 3})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rate_hz": "50"}, "rate_hz='50'"),
        ({"rate_hz": 50.0}, "rate_hz=50.0"),
        ({"rate_hz": True}, "rate_hz=True"),
        ({"rate_hz": 0}, "rate_hz=0"),
        ({"rate_hz": 3}, "rate_hz=3"),
        ({"classes": -1}, "classes=-1"),
        ({"classes": 0}, "classes=0"),
        ({"classes": float("inf")}, "classes=inf"),
        ({"classes": 1 << 40}, "classes=1099511627776"),
        ({"classes": None}, "classes=None"),
        ({"artefact": []}, r"artefact=\[\]"),
        ({"artefact": ""}, "artefact=''"),
        ({"nonsense": 1}, "unknown field 'nonsense'"),
    ],
)
def test_a_wrong_field_of_labels_json_is_a_config_error_that_names_it(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(ConfigError, match=rf"labels\.json: {named}"):
        LabelMetadata.read(str(tmp_path))


def test_a_missing_file_or_field_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `auricle targets`"):
        LabelMetadata.read(str(tmp_path))
    (tmp_path / "labels.json").write_text(json.dumps({"artefact": "k1", "rate_hz": 50}))
    with pytest.raises(ConfigError, match="classes=None must be"):
        LabelMetadata.read(str(tmp_path))


def _parquet(keys: Any, labels: Any, artefact: bytes = b"k1") -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"key": keys, **({"labels": labels} if labels is not None else {})})
    pq.write_table(table.replace_schema_metadata({b"artefact": artefact}), buffer)
    return buffer.getvalue()


def test_damaged_labels_of_a_shard_name_the_shard(tmp_path: Path) -> None:
    root, out = write_shards(tmp_path / "set", [sounds([0.5, 0.5])]), tmp_path / "labels"
    files = ShardFiles(ShardSet(done_records(str(root))))
    shard, index = files.records[0].shard, files.index(0)
    LabelMetadata(**GOOD).write(str(out))
    write_labels(str(out), shard, LabelMetadata(**GOOD), index.keys, [np.full(25, 2)] * 2)
    assert LabelReader(str(out), 1).of(shard, index, 1, 0, 8000).tolist() == [2] * 25
    good = pa.array([[0, 1], [2]], pa.list_(pa.uint16()))
    for content in (
        b"PAR1",
        _parquet(index.keys, None),
        _parquet(index.keys, ["a", "b"]),
        _parquet(index.keys, pa.array([[0], None])),
        _parquet(index.keys, pa.array([[0], [None]])),
        _parquet(index.keys, pa.array([[0], [3]])),
        _parquet(index.keys, pa.array([[0], [-1]])),
        _parquet([["x"], ["y"]], good),
        _parquet(index.keys, good, b"\xff"),
        _parquet(["x", "y"], good),
        _parquet(index.keys, good, b"k2"),
    ):
        (out / file_name(shard)).write_bytes(content)
        with pytest.raises(ShardError, match=f"{shard}: its labels"):
            LabelReader(str(out), 1).of(shard, index, 0, 0, 8000)
    files.close()
