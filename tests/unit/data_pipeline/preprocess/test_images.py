"""Images from a manifest into shards and batches; one that cannot be used changes no other segment."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import IMAGE, Batch
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.loader.reader import open_reader
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.verify import verify
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.records import done_records
from tests.support.corpora import preprocess_here
from tests.support.pictures import colours, png_of_size, save
from tests.support.sounds import write_corpus

NAMES = ("whole", "grey", "none", "missing", "broken", "huge")
UNUSABLE = {"missing": "missing", "broken": "corrupt", "huge": "too_large"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_corpus(tmp_path_factory.mktemp("corpus"), {f"{name}.wav": 1.0 for name in NAMES})
    rows = [
        {"path": f"{name}.wav", "text": name} | ({} if name == "none" else {"image": f"{name}.png"}) for name in NAMES
    ]
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(root / "whole.png", "whole")
    Image.fromarray(colours("grey")[:, :, 0]).save(root / "grey.png")
    (root / "broken.png").write_bytes((root / "whole.png").read_bytes()[:-80])
    (root / "huge.png").write_bytes(png_of_size(60_000, 60_000))
    return root


def preprocessed(corpus: Path, out: Path, listed: str = "list.jsonl", **values: Any) -> Path:
    settings = {"out": str(out), "corpus": {"name": "manifest", "path": str(corpus / listed)}, **values}
    preprocess_here(load(PreprocessConfig, settings))
    return out


@pytest.fixture(scope="module")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preprocessed(corpus, tmp_path_factory.mktemp("out") / "shards")


def data(shards: Path, **values: Any) -> DataConfig:
    settings = {"shards": [str(shards)], "batch_seconds": 6, "micro_batches": 1, "workers": 0}
    settings |= {"min_seconds": 0.1, "max_seconds": 1.0, "labels": ["text"], "images": {"size": 10}}
    return load(DataConfig, settings | values)


def first_batch(config: DataConfig) -> Batch:
    reader = open_reader(config, 0, 0, 1)
    (batch,) = next(reader.steps()).batches
    reader.close()
    return batch


def test_images_that_cannot_be_used_are_listed_and_change_no_segment(
    corpus: Path, shards: Path, tmp_path: Path
) -> None:
    listed = [json.loads(line) for path in (shards / "_rejects").iterdir() for line in path.read_text().splitlines()]
    found = {Path(row["path"]).stem: row["reason"] for row in listed}
    assert found == UNUSABLE
    assert {row["stage"] for row in listed} == {"image"}
    assert all(f"{name}.png" in row["error"] for row in listed for name in [Path(row["path"]).stem])
    records = done_records(str(shards))
    assert sum(record.segments for record in records) == len(NAMES)
    assert sum(record.rejects.get(f"image/{reason}", 0) for record in records for reason in UNUSABLE.values()) == 3
    assert list(verify(str(shards))) == []
    lines = (corpus / "list.jsonl").read_text().splitlines()
    usable = [line for line in lines if json.loads(line)["path"].removesuffix(".wav") not in UNUSABLE]
    (corpus / "usable.jsonl").write_text("\n".join(usable) + "\n")
    alone = members(preprocessed(corpus, tmp_path / "alone", "usable.jsonl", min_shards=1))
    together = members(shards)
    assert {name: content for name, content in together.items() if name.split("-")[0] not in UNUSABLE} == alone


def members(root: Path) -> dict[str, bytes]:
    """Returns the members of all tars by file and ending, without the corpus's name, which is the manifest's."""
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                member = tar.extractfile(name)
                assert member is not None
                content = member.read()
                stem, _, ending = name.partition(".")
                if ending == "json":
                    content = json.dumps(json.loads(content) | {"corpus": ""}, sort_keys=True).encode()
                found[f"{stem.split('-')[0]}-.{ending}"] = content
    return found


def test_an_image_is_between_audio_and_json_of_its_segment(shards: Path) -> None:
    found = members(shards)
    endings: dict[str, list[str]] = {}
    for name in found:
        endings.setdefault(name.split("-")[0], []).append(name.partition(".")[2])
    with_image = {name for name, listed in endings.items() if listed == ["flac", "png", "json"]}
    assert with_image == {"whole", "grey"}
    assert all(listed == ["flac", "json"] for name, listed in endings.items() if name not in with_image)
    with Image.open(io.BytesIO(found["whole-.png"])) as image:
        np.testing.assert_array_equal(np.asarray(image), colours("whole"))


def test_the_reader_gives_pixels_and_says_which_segments_have_an_image(shards: Path) -> None:
    batch = first_batch(data(shards))
    images, texts = batch.images[IMAGE], batch.labels["text"]
    assert dict(zip(texts, images.present_B.tolist(), strict=True)) == {
        name: name in ("whole", "grey") for name in NAMES
    }
    pixels = {text: pixels.numpy() for text, pixels in zip(texts, images.pixels_BCHW, strict=True)}
    np.testing.assert_array_equal(pixels["whole"], colours("whole").transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels["grey"], np.stack([colours("grey")[:, :, 0]] * 3))
    assert max(int(pixels[name].max()) for name in NAMES if name not in ("whole", "grey")) == 0
    assert first_batch(data(shards, images={"size": 6, "channels": 1})).images[IMAGE].pixels_BCHW.shape[1:] == (1, 6, 6)
    assert not first_batch(data(shards, images={"size": 0})).images
    assert batch.emptied(3).images[IMAGE].present_B.tolist() == [False]


def test_a_cropped_segment_has_no_image(shards: Path) -> None:
    assert not first_batch(data(shards, max_seconds=0.5, batch_seconds=3)).images[IMAGE].present_B.any()


def test_data_without_any_image_are_refused_where_images_are_asked_for(corpus: Path, tmp_path: Path) -> None:
    rows = [{"path": f"{name}.wav"} for name in NAMES]
    (corpus / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without = preprocessed(corpus, tmp_path / "plain", "plain.jsonl")
    with pytest.raises(ConfigError, match=r"images.size=10: none of 6 segments has an image; name images"):
        open_reader(data(without, labels=[]), 0, 0, 1)


def test_an_image_outside_of_the_corpus_is_refused_with_its_row(corpus: Path) -> None:
    from data_pipeline.corpora.discovery import discover

    rows = [{"path": "whole.wav", "image": "../secret.png"}, {"path": "grey.wav", "image": "grey.png"}]
    (corpus / "outside.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = discover(load_corpus(corpus / "outside.jsonl"))
    assert [(reject.reason, reject.row) for reject in found.rejects] == [("outside_root", 1)]
    assert [Path(file.image).name for file in found.files] == ["grey.png"]


def load_corpus(path: Path) -> ManifestCorpus:
    return load(ManifestCorpus, {"name": "manifest", "path": str(path)})


def test_the_image_of_a_span_belongs_to_its_segment(corpus: Path, tmp_path: Path) -> None:
    rows = [
        {"path": "whole.wav", "start": 0, "end": 0.5, "image": "whole.png"},
        {"path": "whole.wav", "start": 0.5, "end": 1.0},
    ]
    (corpus / "spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = preprocessed(corpus, tmp_path / "spans", "spans.jsonl", cut={"min_seconds": 0.1})
    batch = first_batch(data(out, batch_seconds=1, labels=["start"]))
    present = dict(zip(batch.labels["start"], batch.images[IMAGE].present_B.tolist(), strict=True))
    assert present == {"0": True, "8000": False}
