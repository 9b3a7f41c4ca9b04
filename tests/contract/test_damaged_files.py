"""Damages each file that a rank reads: it ends with FAILED, after which launchers retry, and never with USAGE."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from data_pipeline.core.schema import dump, load
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.labels.store import LabelMetadata, write_labels
from data_pipeline.sampling import catalog
from data_pipeline.shards.local import ShardFiles, ShardSet
from data_pipeline.shards.records import done_records
from data_pipeline.text.artefact import TokensConfig, make_tokens
from launch.exit_codes import ExitCode
from launch.workers import rank
from pretrain.config import Config
from pretrain.train_module import build_model
from tests.support.checkpoint_states import write_run
from tests.support.tiny_shards import sounds, write_shards
from tests.support.training import config

DATA: dict[str, Any] = {"batch_seconds": 6.0, "micro_batches": 2, "min_seconds": 0.1, "max_seconds": 1.0, "workers": 0}
ENCODER = {"name": "transformer", "layers": 1, "dim": 16, "heads": 2, "ffn_dim": 16}


class Inputs(NamedTuple):
    """Files of a run. folder: shards, labels, tokens, and another run, from whose weights it starts."""

    folder: Path
    config: Config
    finished: Path
    """The run folder after its last update."""


@pytest.fixture(scope="module", autouse=True)
def signals() -> Iterator[None]:
    """Restores the signal handlers that a rank sets."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def end(run: Path, settings: Config) -> ExitCode:
    """Returns the exit code of the only rank of a run folder."""
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(dump(settings)))
    return rank.main(str(run))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Writes all inputs and trains one update on them."""
    folder = tmp_path_factory.mktemp("inputs")
    shards = write_shards(folder / "shards", [sounds([0.5 + i % 5 / 10 for i in range(30)])])
    files, labels = ShardFiles(ShardSet(done_records(str(shards)))), LabelMetadata("k1", 50, 4)
    labels.write(str(folder / "labels"))
    rows = [np.zeros(length // labels.hop, np.uint16) for length in files.index(0).n_samples]
    write_labels(str(folder / "labels"), files.records[0].shard, labels, files.index(0).keys, rows)
    files.close()
    make_tokens(load(TokensConfig, {"shards": str(shards), "out": str(folder / "tokens")}), ["words of a-1"])
    data = DATA | {"shards": str(shards), "targets": {"units": str(folder / "labels")}}
    data |= {"tokens": {"text": str(folder / "tokens")}}
    settings = config(1, data=data, encoder=ENCODER)
    write_run(folder / "init", settings, build_model(settings))
    settings = dataclasses.replace(settings, init=str(folder / "init"))
    assert end(folder / "run", settings) is ExitCode.DONE
    return Inputs(folder, settings, folder / "run")


@contextlib.contextmanager
def damaged(file: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """Damages a file in the block."""
    before = file.read_bytes()
    file.write_bytes(change(before))
    try:
        yield
    finally:
        file.write_bytes(before)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not UTF-8": lambda content: b"\xff\xfe" * 9,
}
CHANGES = TORN | {"a list": lambda content: b"[1]"}
JSON_FILES = ["labels/labels.json", "tokens/tokens.json", "shards/_done/shard-0000.json"]
JSON_FILES += ["init/checkpoints/step_00000001/state.json"]
OTHERS = ["shards/shard-0000.parquet", "shards/shard-0000.tar", "labels/shard-0000.labels.parquet"]
OTHERS += ["init/checkpoints/latest", "init/checkpoints/step_00000001/model.safetensors"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*JSON_FILES, *OTHERS])
def test_a_damaged_input_of_a_new_run(inputs: Inputs, name: str, change: str, tmp_path: Path) -> None:
    with damaged(inputs.folder / name, CHANGES[change]):
        assert end(tmp_path / "run", inputs.config) is ExitCode.FAILED


@pytest.mark.parametrize("name", ["tokens/tokens.json", "init/checkpoints/step_00000001/model.safetensors"])
def test_one_changed_byte_of_a_file_with_a_checksum(inputs: Inputs, name: str, tmp_path: Path) -> None:
    with damaged(inputs.folder / name, lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        assert end(tmp_path / "run", inputs.config) is ExitCode.FAILED


@pytest.mark.parametrize("change", TORN)
@pytest.mark.parametrize("name", ["latest", "state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_of_the_run(inputs: Inputs, name: str, change: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(inputs.finished, run)
    checkpoints = run / "checkpoints"
    folder = checkpoints if name == "latest" else checkpoints / (checkpoints / "latest").read_text().strip()
    with damaged(folder / name, TORN[change]):
        assert end(run, inputs.config) is ExitCode.FAILED
    assert end(run, inputs.config) is ExitCode.DONE


@pytest.mark.parametrize("change", TORN)
@pytest.mark.parametrize("name", ["groups.json", "length.u32"])
def test_a_damaged_catalogue_of_a_large_data_set(
    inputs: Inputs, name: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "LARGE", 0)
    cached = dataclasses.replace(inputs.config.data, cache=str(tmp_path / "cache"))
    settings = dataclasses.replace(inputs.config, data=cached)
    assert end(tmp_path / "run", settings) is ExitCode.DONE
    [file] = (tmp_path / "cache").rglob(name)
    with damaged(file, TORN[change]):
        assert end(tmp_path / "again", settings) is ExitCode.FAILED


@pytest.mark.parametrize("change", TORN)
def test_a_damaged_noise_recording(inputs: Inputs, change: str, tmp_path: Path) -> None:
    noise = tmp_path / "noise" / "street.wav"
    noise.parent.mkdir()
    soundfile.write(noise, np.random.default_rng(0).normal(0, 0.1, 8000), SAMPLE_RATE)
    with_noise = load(type(inputs.config.data.augment), {"noise": str(noise.parent), "noise_prob": 1.0})
    settings = dataclasses.replace(inputs.config, data=dataclasses.replace(inputs.config.data, augment=with_noise))
    with damaged(noise, lambda content: TORN[change](content)[:40]):
        assert end(tmp_path / "run", settings) is ExitCode.FAILED
    assert end(tmp_path / "again", settings) is ExitCode.DONE


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_a_damaged_file_of_a_hugging_face_folder(inputs: Inputs, name: str, change: str, tmp_path: Path) -> None:
    """The intact folder is of another architecture, which is a wrong config."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    weights = "part.safetensors" if "index" in name else "model.safetensors"
    save_file({"weight": torch.ones(3)}, folder / weights)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": weights}}))
    settings = dataclasses.replace(inputs.config, init=str(folder))
    assert end(tmp_path / "intact", settings) is ExitCode.USAGE
    with damaged(folder / name, CHANGES[change]):
        assert end(tmp_path / "run", settings) is ExitCode.FAILED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels/labels.json", b'{"artefact": "k1", "rate_hz": "50", "classes": 4}'),
        ("labels/labels.json", None),
        ("tokens/tokens.json", None),
    ],
)
def test_a_missing_file_or_a_wrong_field_is_a_wrong_config(
    inputs: Inputs, name: str, content: bytes | None, tmp_path: Path
) -> None:
    file = inputs.folder / name
    with damaged(file, lambda before: content or before):
        if content is None:
            file.rename(tmp_path / file.name)
        code = end(tmp_path / "run", inputs.config)
    assert code is ExitCode.USAGE
