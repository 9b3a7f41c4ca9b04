"""An export to a full disk raises OSError and leaves no files."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.core.schema import load
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.config import Config
from pretrain.interop.graph_export import export_graph
from pretrain.interop.hf_export import export
from pretrain.train_module import build_model


@contextlib.contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Makes writes beyond `free` bytes per file fail, through the operating system's file size limit."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def config() -> Config:
    encoder = {"name": "transformer", "dim": 32, "layers": 1, "heads": 2, "ffn_dim": 32, "conv_positions_kernel": 4}
    values = {"data": {"shards": "none"}, "objective": {"name": "hubert"}, "encoder": encoder}
    return load(Config, values | {"frontend": {"name": "waveform_conv", "channels": 16}})


def export_as(kind: str, folder: Path) -> None:
    module = build_model(config())
    if kind == "hugging_face":
        export(config(), module, folder)
    else:
        export_graph(config(), module.model, folder, "onnx" if kind == "onnx" else "torchscript")


@pytest.mark.parametrize("kind", ["torchscript", "hugging_face", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_no_files(kind: str, tmp_path: Path) -> None:
    with full_disk(20_000), pytest.raises(OSError, match=r"too large|cannot be written"):
        export_as(kind, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_existing_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_tensors({"a": torch.zeros(3)}, file)
    before = file.read_bytes()
    with full_disk(1_000), pytest.raises(OSError, match="cannot be written"):
        save_tensors({"a": torch.zeros(9_000)}, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
