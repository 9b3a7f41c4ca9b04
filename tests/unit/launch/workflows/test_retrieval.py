"""`auricle embed` and `auricle search` with an untrained run, whose vectors are as fixed as those of a good one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from data_pipeline.core.schema import load
from data_pipeline.loader.pieces import Piece, find_piece, pieces
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.text.tokenizer import write_tokens
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.retrieval.embedder import Embedder, open_embedder
from pretrain.retrieval.vectors import VectorTable, read_vectors
from tests.support.contract_cases import ALPHABET, HEADS
from tests.support.corpora import preprocess_here
from tests.support.pictures import save as save_picture
from tests.support.sounds import sound
from tests.support.training import save

NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, sounds, pictures, a broken file of each, and shards of them with texts."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("place")
    tokens = {"kind": "characters", "label": "text", "case": "lower", "symbols": list(ALPHABET)}
    write_tokens(str(root / "letters"), tokens)
    data = {"shards": "synthetic", "micro_batches": 4, "tokens": {"text": str(root / "letters")}}
    save(root / "run", 4, data=data, heads={"joint": HEADS["joint_embedding"]})
    save(root / "plain", 4)
    (root / "files").mkdir()
    for name in NAMES:
        soundfile.write(root / "files" / f"{name}.wav", sound(name, 0.6), 16_000)
        save_picture(root / "files" / f"{name}.png", name)
    rows = [{"path": f"{name}.wav", "text": name, "image": f"{name}.png"} for name in NAMES]
    (root / "files" / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = {"name": "manifest", "path": str(root / "files" / "list.jsonl")}
    preprocess_here(load(PreprocessConfig, {"out": str(root / "shards"), "corpus": corpus}))
    (root / "broken").mkdir()
    (root / "broken" / "a.wav").write_bytes(b"RIFF\x10\0\0\0WAVEnothing")
    (root / "broken" / "b.png").write_bytes(b"\x89PNG nothing")
    return root


@pytest.fixture(scope="module")
def embedder(place: Path) -> Embedder:
    return open_embedder(str(place / "run"))


def table_of(embedder: Embedder, place: Path, *places: str, batch: int = 16) -> VectorTable:
    found = pieces([str(place / one) for one in places], ["one", "tw oo"])
    return embedder.table(found, batch, lambda unusable: pytest.fail(unusable.error), lambda: None)


def test_vectors_are_those_of_the_head_and_do_not_depend_on_the_batch(embedder: Embedder, place: Path) -> None:
    together, alone = (table_of(embedder, place, "files", batch=batch) for batch in (16, 1))
    assert together.names == alone.names
    assert sorted(set(zip(together.kinds, together.names, strict=True))) == sorted(
        [("image", f"{name}.png") for name in NAMES]
        + [("speech", f"{name}.wav") for name in NAMES]
        + [("text", "one"), ("text", "tw oo")]
    )
    np.testing.assert_allclose(together.vectors_NE, alone.vectors_NE, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together.vectors_NE, axis=1), 1, atol=1e-6)
    wave = torch.from_numpy(sound("one", 0.6))[None]
    with torch.inference_mode():
        expected = embedder.head.embed_speech(embedder.model(wave, torch.tensor([wave.shape[1]])))
    found = together.vectors_NE[together.names.index("one.wav")]
    np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-3)  # the file has 16 bits


def test_segments_of_shards_give_speech_text_and_image_equal_to_those_of_files(embedder: Embedder, place: Path) -> None:
    files, shards = table_of(embedder, place, "files"), table_of(embedder, place, "shards")
    assert sorted(shards.kinds) == ["image"] * 3 + ["speech"] * 3 + ["text"] * 5
    for name in NAMES:
        for kind, ending in (("image", ".png"), ("speech", ".wav")):
            row = next(
                row for row, key in enumerate(shards.names) if shards.kinds[row] == kind and key.startswith(f"{name}-")
            )
            expected = files.vectors_NE[files.names.index(f"{name}{ending}")]
            np.testing.assert_allclose(shards.vectors_NE[row], expected, atol=1e-6)
            again = find_piece(kind, shards.names[row], shards.places[row])  # type: ignore[arg-type]
            assert isinstance(again, Piece)
            assert again.kind == kind


def test_embed_writes_parquet_and_npy_and_lists_what_is_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"checkpoint={place / 'run'}", "texts=[one,'€€']"]
    files = f"files=[{place / 'files'},{place / 'broken'}]"
    assert main(["embed", *common, files, f"out={tmp_path / 'v.parquet'}"]) == ExitCode.FAILED
    shown = capsys.readouterr().err
    assert "7 vectors (3 image, 3 speech, 1 text)" in shown
    assert all(part in shown for part in ("left out 3", "a.wav", "b.png", "€€"))
    assert main(["embed", *common[:1], files.replace(f",{place / 'broken'}", ""), f"out={tmp_path / 'v.npy'}"]) == 0
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["kind", "name", "place", "vector"]
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    array = np.load(tmp_path / "v.npy")
    assert array.shape == (6, 16)
    found = read_vectors(tmp_path / "v.parquet")
    assert list(found.names[:6]) == [row["name"] for row in rows]
    np.testing.assert_allclose(found.vectors_NE[:6], array, atol=1e-6)


@pytest.mark.parametrize("query", ["one", "files/two.wav", "files/three.png"])
def test_a_search_by_text_recording_or_image_finds_itself_first(
    place: Path, tmp_path: Path, query: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = query if query == "one" else str(place / query)
    index = f"index={place / 'shards'}"
    arguments = ["search", f"checkpoint={place / 'run'}", index, f"query={given}", "format=json", "top=3"]
    assert main([*arguments, f"gallery={tmp_path / 'page.html'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert found[0]["score"] == pytest.approx(1.0, abs=1e-4)
    assert Path(query).stem in found[0]["name"]
    page = (tmp_path / "page.html").read_text()
    kind = {"one": "", "files/two.wav": "<audio controls", "files/three.png": "<img alt"}[query]
    assert page.count(kind) >= 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_an_index_of_another_model_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VectorTable("other joint", ("text",), ("one",), ("",), np.eye(16, dtype=np.float32)[:1]).write(
        tmp_path / "v.parquet"
    )
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    for index, message in (
        ("v", "of another model"),
        ("bad", "not a table of `auricle embed"),
        ("none", "not a table"),
    ):
        arguments = [f"checkpoint={place / 'run'}", f"index={tmp_path / index}.parquet", "query=one"]
        assert main(["search", *arguments]) == ExitCode.USAGE
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=plain", "query=one"], "no head joint_embedding"),
        (["checkpoint=run", "head=jiont", "query=one"], "did you mean joint"),
        (["checkpoint=run", "query='€€'"], "no token"),
        (["checkpoint=run", "query=broken/a.wav"], "query=.*a.wav"),
        (["checkpoint=run", "query=broken/b.png"], "query=.*b.png"),
        (["checkpoint=run", "query=nowhere.wav", "query_kind=speech"], "no such file"),
        (["checkpoint=run", "query=one", "index=nowhere"], "no such file"),
        (["checkpoint=run", "query=one", "index=[broken,nowhere.png]"], "index=nowhere.png: there is no such file"),
        (["checkpoint=run", "query=one", "gallery=page.pdf"], "must end in .html"),
    ],
)
def test_what_cannot_be_searched_is_an_error_with_its_reason(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    index = [] if any("index=" in argument for argument in arguments) else ["index=files"]
    assert main(["search", *arguments, *index]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "left out" not in said, "places are checked before any is read"


def test_the_evaluation_has_every_direction_and_counts_what_cannot_be_embedded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = place / "files"
    rows = [
        {"path": f"{files}/{name}.wav", "text": name, "image": f"{files}/{name}.png", "speaker": name, "split": "test"}
        for name in NAMES
    ]
    soundfile.write(tmp_path / "four.wav", sound("four", 0.6), 16_000)
    rows += [{"path": "four.wav", "image": f"{place}/broken/b.png", "speaker": "four", "split": "test"}]
    manifest = tmp_path / "asked.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["evaluate", "task=retrieval", f"manifest={manifest}", f"out={tmp_path}/found", f"runs={tmp_path}"]
    assert main([*given, f"checkpoint={place}/run", "name=first"]) == ExitCode.DONE
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    kinds = ("speech", "text", "image")
    assert sorted(row["measure"] for row in found) == sorted(
        f"recall@{most}, {a} → {b}" for most in (1, 5, 10) for a in kinds for b in kinds if a != b
    )
    assert {row["value"] for row in found if not row["measure"].startswith("recall@1,")} == {1.0}
    assert "cannot be embedded: 1, such as" in capsys.readouterr().out
    assert main([*given, f"checkpoint={place}/plain", "name=second"]) == ExitCode.USAGE
    assert main([*given, f"checkpoint={place}/run", "ask=valid", "name=third"]) == ExitCode.USAGE
