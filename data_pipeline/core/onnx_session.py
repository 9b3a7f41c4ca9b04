"""Opens ONNX graphs on the CPU: the one place for the options of onnxruntime.

`pretrain/interop/stream_program.py`, which is copied to devices, has its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_session(file: Path, threads: int = 0) -> Any:
    """Returns an `onnxruntime.InferenceSession`.

    Args:
        file: the graph.
        threads: intra-op threads; 0: as many as there are cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
