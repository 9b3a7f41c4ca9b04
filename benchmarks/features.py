"""Spectral features and augmentation: the product's way beside torchaudio's, on the same input in the same run.

    OMP_NUM_THREADS=1 python benchmarks/features.py [--device cuda] [--json benchmarks/results/features_cpu.json]

For each function: time of the alternative over time of what the product uses (above 1: the product's way is faster),
and the largest difference of the two results. "in use" names the one that the product calls.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
import torch.nn.functional as F
import torchaudio.functional as ta

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.audio import transforms
from pretrain.nn.spectral import LogMel, delta

ROUNDS = 15
SECONDS = 10


def fastest(device: str, *works: Callable[[], Any]) -> list[float]:
    """Milliseconds of each, the best of several alternating rounds."""
    best = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        for number, work in enumerate(works):
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best[number] = min(best[number], 1e3 * (time.perf_counter() - began))
    return best


def low_passed(length: int) -> np.ndarray:
    """Returns noise below 6 kHz at 16 kHz, where resamplers with different transition bands can agree."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(length) * 0.1)
    spectrum[round(length * 6 / 16) :] = 0
    return np.fft.irfft(spectrum, length).astype(np.float32)


def features(device: str) -> dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Returns name → (in use, auricle's function, the alternative); both functions return comparable results."""
    wave_BT = 0.1 * torch.randn(8, SECONDS * 16_000, generator=torch.Generator().manual_seed(0)).to(device)
    lengths_B = torch.full((8,), wave_BT.shape[1], device=device)
    mel = LogMel(normalize="fixed").to(device)
    bank = ta.melscale_fbanks(257, 0.0, 8000.0, 80, 16_000).to(device)
    cepstra_BFC = torch.randn(8, 998, 13, device=device)
    frames_B = torch.full((8,), 998, device=device)
    rng = np.random.default_rng(0)
    wave, noise = (rng.standard_normal(SECONDS * 16_000).astype(np.float32) * 0.1 for _ in range(2))
    response = (np.exp(-np.arange(8_000) / 1_000) * rng.standard_normal(8_000)).astype(np.float32)

    def log_mel(filters: torch.Tensor) -> torch.Tensor:
        padding = (mel.n_fft - mel.window) // 2
        power = ta.spectrogram(
            F.pad(wave_BT, (padding, padding)), 0, mel.hann, mel.n_fft, mel.hop, mel.window, 2.0, False, center=False
        )
        return (torch.log(power.transpose(1, 2) @ filters + mel.FLOOR) - mel.MEAN) / mel.STD

    def reverberated() -> torch.Tensor:
        tail = torch.from_numpy(response[np.abs(response).argmax() :].copy())
        wet = ta.fftconvolve(torch.from_numpy(wave), tail)[: len(wave)]
        return wet * (transforms.power(wave) / wet.square().mean()).sqrt()

    def numpy_noise() -> np.ndarray:
        scale = np.sqrt(transforms.power(wave) / transforms.power(noise) * 10 ** (-5 / 10))
        return wave + np.float32(scale) * noise

    found: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {
        "log-mel": ("ours", lambda: mel(wave_BT, lengths_B).x_BFD, lambda: log_mel(mel.filters)),
        "log-mel with torchaudio's filters": ("ours", lambda: mel(wave_BT, lengths_B).x_BFD, lambda: log_mel(bank)),
        "Δ of equally long rows": (
            "ours",
            lambda: delta(cepstra_BFC, frames_B),
            lambda: ta.compute_deltas(cepstra_BFC.transpose(1, 2)).transpose(1, 2),
        ),
    }
    if device == "cpu":
        found["noise at a ratio"] = ("torchaudio", lambda: transforms.add_noise(wave, noise, 5.0), numpy_noise)
        found["reverberation"] = ("ours", lambda: transforms.reverberate(wave, response), reverberated)
        found |= resampling()
    return found


def resampling() -> dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Returns soxr, and torchaudio's default filter and one as steep as soxr's (librosa's "kaiser_best")."""
    best = {"lowpass_filter_width": 64, "rolloff": 0.9475937167, "resampling_method": "sinc_interp_kaiser"}
    found: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {}
    for name, options in (("default filter", {}), ("kaiser_best filter", {**best, "beta": 14.769656459})):
        for source in (17_600, 14_400, 44_100):
            wave = low_passed(SECONDS * source)

            def theirs(wave: np.ndarray = wave, source: int = source, options: Any = options) -> torch.Tensor:
                return ta.resample(torch.from_numpy(wave), source, 16_000, **options)[300 : SECONDS * 16_000 - 300]

            def ours(wave: np.ndarray = wave, source: int = source) -> np.ndarray:
                return soxr.resample(wave, source, 16_000)[300 : SECONDS * 16_000 - 300]

            found[f"{source} to 16000 Hz, {name}"] = ("soxr", ours, theirs)
    return found


def main() -> None:
    """Prints a table; `--json` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {given.device}")
    print(f"{'':44} {'in use':10} {'ms':>8} {'other ms':>9} {'ratio':>6} {'difference':>10}")
    rows = {}
    for name, (used, ours, other) in features(given.device).items():
        mine, theirs = (torch.as_tensor(work()).cpu() for work in (ours, other))
        difference = float((mine - theirs).abs().max())
        first, second = fastest(given.device, ours, other)
        rows[name] = {
            "in use": used,
            "ms": first,
            "other_ms": second,
            "ratio": second / first,
            "difference": difference,
        }
        print(f"{name:44} {used:10} {first:8.3f} {second:9.3f} {second / first:6.2f} {difference:10.1e}")
    if given.json:
        result = {"device": given.device, "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
