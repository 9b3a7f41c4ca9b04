"""An edge package runs beside numpy and onnxruntime alone, and gives the features of the model's own stream."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.text.tokenizer import write_tokens
from launch.main import main
from launch.workflows import edge_export
from pretrain.checkpointing.weights import load_checkpoint
from pretrain.interop import stream_program
from pretrain.nn.attention_patterns import Pattern
from pretrain.nn.block_stack import BlockStack
from tests.support.tiny_shards import sounds, write_shards
from tests.support.training import save

pytest.importorskip("onnxscript")
ENCODER = {
    "name": "transformer", "layers": 2, "dim": 32, "heads": 2, "ffn_dim": 64, "norm": "pre", "positions": "rope",
    "attention": "chunked", "chunk_frames": [4], "left_chunks": [2], "widths": [[2, 64], [1, 32]],
}  # fmt: skip


def output(folder: Path, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs the package's program, without this project on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(folder / "run.py"), *arguments]
    return subprocess.run(command, input=given, capture_output=True, cwd=folder, env=environment, timeout=60)


def features(lines: bytes) -> np.ndarray:
    return np.concatenate([np.array(json.loads(line)["features"]).reshape(-1, 32) for line in lines.splitlines()])


def write_wav(file: Path, samples: np.ndarray) -> None:
    with wave.open(str(file), "wb") as target:
        target.setparams((1, 2, 16_000, 0, "NONE", ""))
        target.writeframes(samples.astype("<i2").tobytes())


def test_a_package_streams_the_features_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = str(write_shards(tmp_path / "shards", [sounds([1.0] * 6)]))
    save(tmp_path / "run", 2, frontend={"name": "log_mel", "normalize": "fixed", "subsampling": 2}, encoder=ENCODER)
    checkpoint, edge = tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "edge"
    line = ["export", str(checkpoint), str(edge), "--to", "edge", "--int8", "dynamic", "--shards", shards]
    assert main(line) == 0
    assert "frames change their cluster" in capsys.readouterr().out
    about = json.loads((edge / "edge.json").read_text())
    assert about["precision"] == "int8"
    assert about["int8"]["products"] == 2 * 4
    assert {file.name for file in edge.iterdir()} == {"model.onnx", "edge.json", "run.py", "README.md"}

    rng = np.random.default_rng(0)
    pcm = (3000 * rng.standard_normal(23_456)).clip(-30_000, 30_000).astype("<i2")
    found = output(edge, "--stdin", given=pcm.tobytes())
    assert found.returncode == 0, found.stderr.decode()
    model = load_checkpoint(checkpoint).module.model.eval()
    assert isinstance(model.encoder, BlockStack)
    model.encoder.stream = Pattern(chunk=4, left_chunks=2)
    with torch.no_grad():
        wave_1T = torch.from_numpy(pcm.astype(np.float32) / 32768)[None]
        expected = model(wave_1T, torch.tensor([wave_1T.shape[1]])).layers[-1][0].numpy()
    given = features(found.stdout)
    assert given.shape == expected.shape
    assert 0 < np.sqrt(np.mean((given - expected) ** 2)) < 0.05 * expected.std(), "INT8, so close but not equal"

    write_wav(tmp_path / "sound.wav", pcm)
    assert np.array_equal(features(output(edge, str(tmp_path / "sound.wav")).stdout), given)
    assert main(["bench", str(edge), "--runs", "2", "--seconds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"][0]["first_output_ms"] < 1000

    content = bytearray((edge / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (edge / "model.onnx").write_bytes(content)
    changed = output(edge, "--stdin")
    assert changed.returncode == 1
    assert b"differs from its sha256 in edge.json" in changed.stderr


def test_the_head_that_is_named_gives_the_symbols(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = {"kind": "characters", "label": "text", "case": "lower", "symbols": ["▁", "a", "b"]}
    write_tokens(str(tmp_path / "tokens"), tokens)
    data = {"shards": "synthetic", "micro_batches": 4, "tokens": {"letters": str(tmp_path / "tokens")}}
    heads = {
        "first": {"name": "ctc", "symbols": "xyz"},
        "second": {"name": "ctc", "tokens": "letters", "vocabulary": 3},
    }
    frontend = {"name": "log_mel", "normalize": "fixed", "subsampling": 2}
    save(tmp_path / "run", 2, data=data, heads=heads, frontend=frontend, encoder=ENCODER)
    checkpoint, edge = tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "edge"
    line = ["export", str(checkpoint), str(edge), "--to"]
    assert main([*line, "edge"]) == 2
    assert "must be one of first, second" in capsys.readouterr().err
    assert main([*line, "onnx", "--head", "second"]) == 2
    assert "--head second: needs --to" in capsys.readouterr().err
    assert not edge.exists()
    assert main([*line, "edge", "--head", "second"]) == 0
    assert json.loads((edge / "edge.json").read_text())["symbols"] == [" ", "a", "b"]
    said = output(edge, "--stdin", given=bytes(64_000))
    assert said.returncode == 0, said.stderr.decode()
    assert set(json.loads(said.stdout.splitlines()[0])["text"]) <= set(" ab")


def test_an_int8_recogniser_is_compared_by_its_word_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = str(write_shards(tmp_path / "shards", [sounds([1.0] * 6)]))
    frontend = {"name": "log_mel", "normalize": "fixed", "subsampling": 2}
    heads = {"text": {"name": "ctc", "symbols": " ab"}}
    data = {"shards": "synthetic", "micro_batches": 4, "labels": ["text"]}
    save(tmp_path / "run", 2, data=data, heads=heads, frontend=frontend, encoder=ENCODER)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    rows = ["path\tspeaker\ttext\tsplit"]
    for number, split in enumerate(("train", "valid", "valid")):
        write_wav(tmp_path / f"{number}.wav", np.random.default_rng(number).standard_normal(12_000) * 3000)
        rows.append(f"{number}.wav\ts{number}\ta b\t{split}")
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    line = ["export", str(checkpoint), str(tmp_path / "edge"), "--to", "edge", "--int8", "dynamic", "--shards", shards]
    line += ["--head", "text", "--manifest"]
    manifest, edge = tmp_path / "manifest.tsv", tmp_path / "edge"
    assert main([*line, str(manifest)]) == 0
    assert re.search(r"WER \d+\.\d → \d+\.\d %", capsys.readouterr().out)
    waves = [0.1 * np.random.default_rng(9).standard_normal(20_000).astype(np.float32)]
    said = output(edge, "--stdin", given=(waves[0] * 32768).astype("<i2").tobytes())
    assert edge_export.texts_of(edge, waves)[0] == json.loads(said.stdout.splitlines()[-1])["text"]
    found = iter(["a b", "a b", "a b", "b"])  # of fp32, then of INT8, a text for each valid recording
    monkeypatch.setattr(edge_export, "texts_of", lambda folder, waves: [next(found) for _ in waves])
    with pytest.raises(ConfigError, match=r"word error rate rises by 25.0 points \(allowed: 1\), 0.0 → 25.0"):
        edge_export.require_accurate_task(edge, edge, str(manifest))
    manifest.write_text("\n".join(rows[:2]) + "\n")
    with pytest.raises(ConfigError, match="no text in the split valid"):
        edge_export.require_accurate_task(edge, edge, str(manifest))


def test_the_program_is_short_and_needs_two_packages_only() -> None:
    source = Path(stream_program.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 150
    tree = ast.walk(ast.parse(source))
    named = {(n.names[0].name if isinstance(n, ast.Import) else str(n.module)).partition(".")[0]
             for n in tree if isinstance(n, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert named - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_a_folder_without_a_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has neither edge\.json nor stream\.json"):
        stream_program.Stream(tmp_path)


def test_ctc_text_collapses_repeats_across_chunks() -> None:
    text = stream_program.Text(list("abc"))
    eye = np.eye(4)
    assert text.add(eye[[1, 1, 0, 1]]) == "aa"
    assert text.add(eye[[1, 2, 2, 0]]) == "aab"
    assert text.add(eye[[3]]) == "aabc"


@pytest.mark.parametrize(
    ("encoder", "options", "words"),
    [
        (ENCODER | {"attention": "full"}, [], "attention"),
        (ENCODER, ["--int8", "static", "--shards", "x"], "takes --int8 dynamic"),
    ],
)
def test_a_model_that_hears_the_future_is_refused(
    encoder: dict[str, object], options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", 2, frontend={"name": "log_mel", "normalize": "fixed"}, encoder=encoder)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert main(["export", str(checkpoint), str(tmp_path / "edge"), "--to", "edge", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "edge").exists()
