"""Recognises a stream with an exported model: needs onnxruntime and numpy only.

auricle export runs/NAME folder --to onnx_stream
arecord -f S16_LE -r 16000 -c 1 -t raw | python onnx_stream_client.py folder
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


class Stream:
    """One stream; `push` yields ln p of all classes for new frames, (F, V)."""

    def __init__(self, folder):
        self.about = json.loads((Path(folder) / "stream.json").read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(f"{folder}/stream.onnx", providers=["CPUExecutionProvider"])
        self.used = {given.name for given in self.session.get_inputs()}
        self.made = [output.name for output in self.session.get_outputs()]
        self.states = {name: np.zeros((1, *shape), np.float32) for name, shape in self.about["states"].items()}
        self.pending, self.frames = np.zeros(self.about["zeros_before"], np.float32), 0

    def push(self, samples, last=False):  # (T,) float32 in [-1, 1] at 16 kHz, of any length
        self.pending = np.concatenate([self.pending, samples])
        while last or len(self.pending) >= self.about["window_samples"]:
            yield (rows := self.chunk())
            last = last and len(rows) == self.about["chunk_frames"]

    def chunk(self):
        window = self.pending[: self.about["window_samples"]]
        given = {"wave": np.pad(window, (0, self.about["window_samples"] - len(window)))[None]} | self.states
        given |= {"samples": np.array([len(window)]), "frames": np.array([self.frames])}
        values = self.session.run(self.made, {name: given[name] for name in self.used})
        found = dict(zip(self.made, values, strict=True))
        self.states = {name: found[f"next_{name}"] for name in self.states}
        self.pending = self.pending[self.about["advance_samples"] :]
        self.frames += (new := int(found["lengths"][0]))
        return found["log_probs"][0, :new]


def write(rows, symbols, last):  # CTC: class 0 is the blank, and repeats count once
    for best in rows.argmax(1).tolist():
        print(symbols[best - 1] if best not in (0, last) else "", end="", flush=True)
        last = best
    return last


if __name__ == "__main__":
    stream, symbol, rest, block = Stream(sys.argv[1]), 0, b"", b"-"
    while block:
        block = sys.stdin.buffer.read1(4096)
        data, rest = rest + block, (rest + block)[len(rest + block) // 2 * 2 :]  # half a sample waits
        for rows in stream.push(np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / 32768, last=not block):
            symbol = write(rows, stream.about["symbols"], symbol)
