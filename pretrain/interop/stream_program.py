"""Runs the streaming graph beside it on a device: needs Python, numpy and onnxruntime.

`auricle export` writes this file as run.py into folders of `--to edge` and `--to onnx_stream`.

    python run.py recording.wav                                            # 16 kHz mono, 16 bits
    arecord -f S16_LE -r 16000 -c 1 -t raw | python run.py --stdin

Prints a JSON line per chunk: the time in the audio, and the text so far (recognisers) or the features of new frames.
"""

import argparse
import hashlib
import json
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

GRAPHS = {"edge.json": "model.onnx", "stream.json": "stream.onnx"}
"""Description -> graph."""


def open_session(file: Path, threads: int) -> Any:
    """Returns an onnxruntime session on the CPU with this number of intra-op threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class Stream:
    """One stream of an exported graph.

    Args:
        folder: with the graph and its description, edge.json or stream.json.
        threads: intra-op threads.

    Raises:
        SystemExit: there is no description, or the graph is not the described one.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        found = [name for name in GRAPHS if (folder / name).is_file()]
        description = found[0] if found else sys.exit(f"{folder}: has neither {' nor '.join(GRAPHS)}")
        self.about: dict[str, Any] = json.loads((folder / description).read_text(encoding="utf-8"))
        for name, expected in self.about.get("sha256", {}).items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                sys.exit(f"{folder / name}: differs from its sha256 in {description}; copy it again")
        self.session = open_session(folder / GRAPHS[description], threads)
        self.used = {given.name for given in self.session.get_inputs()}
        self.made = [output.name for output in self.session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Begins a new stream."""
        self.states = {name: np.zeros((1, *shape), np.float32) for name, shape in self.about["states"].items()}
        self.pending, self.frames = np.zeros(self.about["zeros_before"], np.float32), 0

    def push(self, samples_T: Any) -> Iterator[dict[str, Any]]:
        """Takes (T,) float32 samples in [-1, 1] of any length; yields the outputs of each complete chunk."""
        self.pending = np.concatenate([self.pending, samples_T])
        while len(self.pending) >= self.about["window_samples"]:
            yield self._chunk()

    def finish(self) -> Iterator[dict[str, Any]]:
        """Ends the stream; yields the outputs of the chunks that are left."""
        while True:
            found = self._chunk()
            yield found
            if found["lengths"][0] < self.about["chunk_frames"]:
                return

    def _chunk(self) -> dict[str, Any]:
        """Runs one chunk; returns its outputs, cut to the valid frames: features (F, D), log_probs (F, V), lengths."""
        window = self.pending[: self.about["window_samples"]]
        given: dict[str, Any] = dict(self.states)
        given["wave"] = np.pad(window, (0, self.about["window_samples"] - len(window)))[None]
        given |= {"samples": np.array([len(window)]), "frames": np.array([self.frames])}
        values = self.session.run(self.made, {name: given[name] for name in self.used})
        found = dict(zip(self.made, values, strict=True))
        self.states = {name: found.pop(f"next_{name}") for name in self.states}
        self.pending = self.pending[self.about["advance_samples"] :]
        n = int(found["lengths"][0])
        self.frames += n
        return {name: value if name == "lengths" else value[0, :n] for name, value in found.items()}


class Text:
    """Greedy CTC text of a stream: the best symbol of each frame, repeats counted once, class 0 the blank."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.last, self.text = tokens, 0, ""

    def add(self, log_probs_FV: Any) -> str:
        """Takes ln p of new frames; returns the text so far."""
        for best in log_probs_FV.argmax(1).tolist():
            if best not in (0, self.last):
                self.text += self.tokens[best - 1]
            self.last = best
        return self.text


def blocks(source: str) -> Iterator[Any]:
    """Yields float32 samples of standard input ("-") or of a WAV file, 100 ms at a time."""
    file: Any
    with sys.stdin.buffer if source == "-" else wave.open(source) as file:
        form = (16_000, 1, 2) if source == "-" else (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (16_000, 1, 2):
            sys.exit(f"{source}: needs 16000 Hz, 1 channel, 16 bits; has {form[0]}, {form[1]}, {8 * form[2]}")
        rest = b""
        while data := file.read(3200) if source == "-" else file.readframes(1600):
            data = rest + data
            whole = len(data) // 2 * 2
            rest = data[whole:]
            yield np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768


def main() -> None:
    """Prints a JSON line per chunk."""
    parser = argparse.ArgumentParser(description="runs the model of this folder on audio")
    parser.add_argument("wav", nargs="?", help="a WAV file: 16 kHz, one channel, 16 bits")
    parser.add_argument("--stdin", action="store_true", help="read raw samples of the same form from standard input")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.stdin == bool(given.wav):
        parser.error("give a WAV file or --stdin")
    stream = Stream(Path(__file__).resolve().parent, given.threads)
    text = Text(stream.about["symbols"])

    def show(found: dict[str, Any]) -> None:
        line: dict[str, Any] = {"seconds": round(stream.frames / stream.about["frames_per_second"], 3)}
        if stream.about["symbols"]:
            line["text"] = text.add(found["log_probs"])
        else:
            line["features"] = found["features"].round(4).tolist()
        print(json.dumps(line, ensure_ascii=False), flush=True)

    for samples_T in blocks("-" if given.stdin else given.wav):
        for found in stream.push(samples_T):
            show(found)
    for found in stream.finish():
        show(found)


if __name__ == "__main__":
    main()
