"""Recognises a stream with an exported model: needs onnxruntime and numpy only.

auricle export runs/NAME model --to onnx_stream
arecord -f S16_LE -r 16000 -c 1 -t raw | python onnx_stream_client.py model -      # or a 16 kHz mono WAV file
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime


class Stream:
    """One stream: `push` samples, then `finish`; both return rows of ln p of the new frames, (F, V) each."""

    def __init__(self, folder):
        self.about = json.loads((Path(folder) / "stream.json").read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(f"{folder}/stream.onnx", providers=["CPUExecutionProvider"])
        self.used = {given.name for given in self.session.get_inputs()}
        self.made = [output.name for output in self.session.get_outputs()]
        self.states = {name: np.zeros((1, *shape), np.float32) for name, shape in self.about["states"].items()}
        self.pending, self.frames = np.zeros(self.about["zeros_before"], np.float32), 0

    def push(self, samples):  # (T,) float32 in [-1, 1] at 16 kHz, of any length
        self.pending, rows = np.concatenate([self.pending, samples]), []
        while len(self.pending) >= self.about["window_samples"]:
            rows.append(self.chunk())
        return rows

    def finish(self):
        rows = [self.chunk()]
        while len(rows[-1]) == self.about["chunk_frames"]:
            rows.append(self.chunk())
        return rows

    def chunk(self):
        window = self.pending[: self.about["window_samples"]]
        given = {"wave": np.pad(window, (0, self.about["window_samples"] - len(window)))[None]} | self.states
        given |= {"samples": np.array([len(window)]), "frames": np.array([self.frames])}
        values = self.session.run(self.made, {name: given[name] for name in self.used})
        found = dict(zip(self.made, values, strict=True))
        self.states = {name: found[f"next_{name}"] for name in self.states}
        self.pending = self.pending[self.about["advance_samples"] :]
        self.frames += int(found["lengths"][0])
        return found["log_probs"][0, : int(found["lengths"][0])]


def show(rows, symbols, last):  # CTC: class 0 is the blank, and repeats count once
    for best in (int(best) for part in rows for best in part.argmax(1)):
        print(symbols[best - 1] if best not in (0, last) else "", end="", flush=True)
        last = best
    return last


if __name__ == "__main__":
    stream, last, source = Stream(sys.argv[1]), 0, sys.argv[2]
    with sys.stdin.buffer if source == "-" else wave.open(source) as file:
        while data := file.read(640) if source == "-" else file.readframes(320):
            samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
            last = show(stream.push(samples), stream.about["symbols"], last)
    show(stream.finish(), stream.about["symbols"], last)
    print()
