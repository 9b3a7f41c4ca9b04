"""Measures which part of another speaking rate costs accuracy: the timing, or the spectrum that resampling shifts.

    python benchmarks/prove/speaking_rate.py runs/quality/runs/quality_hubert

A linear probe for phones is fitted to a run's features, to those of random weights and to log-mel with context, at
speed 1, and evaluated on unseen speakers of AURICLE_SPEECH at 0.8 and 1.2 times the speed in four ways: `resampled`
(timing and spectrum change, as in time_contrastive.py), `stretched` by a phase vocoder (timing alone), `shifted`
(resampled, and stretched back to the old timing), and `neither` (stretched, and back: what the vocoder itself costs).
Writes benchmarks/results/speaking_rate.json and .md.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import markdown_table, parser_of, real_speech  # noqa: E402
from data_pipeline.audio.transforms import change_speed  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig, ProbeConfig  # noqa: E402
from pretrain.evaluate.evaluator import few_threads  # noqa: E402
from pretrain.evaluate.features import Labelled, phone_frames  # noqa: E402
from pretrain.evaluate.frozen_encoders import FrozenEncoder, freeze, log_mel_with_context, open_encoder  # noqa: E402
from pretrain.evaluate.manifest import Interval, Utterance  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE, Tally, bootstrap  # noqa: E402
from pretrain.evaluate.probe import fit_probe  # noqa: E402
from pretrain.evaluate.task_inputs import TaskInputs  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

SPEEDS = (0.8, 1.2)
N_FFT, HOP = 512, 128
BOOTSTRAP = 2_000


def unchanged(wave_T: Tensor, speed: float) -> Tensor:
    """Returns the audio as it is."""
    return wave_T


def resampled(wave_T: Tensor, speed: float) -> Tensor:
    """Returns the audio `speed` times as fast, pitch and formants included."""
    return torch.from_numpy(change_speed(wave_T.numpy(), speed, round(len(wave_T) / speed)))


def stretched(wave_T: Tensor, speed: float) -> Tensor:
    """Returns the audio `speed` times as fast with its own spectrum, by a phase vocoder, (T / speed,)."""
    from torchaudio.functional import phase_vocoder

    window_N = torch.hann_window(N_FFT)
    spectrum_FT = torch.stft(wave_T, N_FFT, HOP, window=window_N, return_complex=True)
    advance_F1 = torch.linspace(0, math.pi * HOP, N_FFT // 2 + 1)[:, None]
    changed_FT = phase_vocoder(spectrum_FT, speed, advance_F1)
    return torch.istft(changed_FT, N_FFT, HOP, window=window_N, length=round(len(wave_T) / speed))


def shifted(wave_T: Tensor, speed: float) -> Tensor:
    """Returns the audio with pitch and formants `speed` times as high, at its own timing."""
    return stretched(resampled(wave_T, speed), 1 / speed)[: len(wave_T)]


def neither(wave_T: Tensor, speed: float) -> Tensor:
    """Returns the audio stretched and stretched back."""
    return stretched(stretched(wave_T, speed), 1 / speed)[: len(wave_T)]


WAYS: Final[dict[str, tuple[Callable[[Tensor, float], Tensor], bool]]] = {
    "resampled": (resampled, True), "stretched": (stretched, True), "shifted": (shifted, False),
    "neither": (neither, False),
}  # fmt: skip
"""Way -> how the audio is changed, and whether its timing is."""


def features(
    task: TaskInputs, encoder: FrozenEncoder, part: int, change: Callable[[Tensor, float], Tensor], speed: float,
    timing: float,
) -> Labelled:  # fmt: skip
    """Returns the labelled frames of a part (0 train, 1 valid, 2 test), with alignments `timing` times as fast."""
    chosen = task.parts[part]
    phones = {
        u.name: [Interval(i.start / timing, i.end / timing, i.phone) for i in task.phones[u.name]] for u in chosen
    }

    def waves(utterance: Utterance) -> Tensor:
        return change(task.waves(utterance), speed)

    return phone_frames(encoder, chosen, phones, task.classes, waves)  # type: ignore[arg-type]


def measured(task: TaskInputs, encoder: FrozenEncoder) -> dict[str, list[Tally]]:
    """Fits a probe at speed 1; returns its tallies on non-silence frames by way and speed."""
    train, valid = (features(task, encoder, part, unchanged, 1.0, 1.0) for part in (0, 1))
    probe = fit_probe(train, valid, len(task.classes), ProbeConfig(), silent=task.silent)
    del train, valid
    conditions = {"1×": (unchanged, 1.0, 1.0)} | {
        f"{way} {speed:g}×": (change, speed, speed if timed else 1.0)
        for speed in SPEEDS
        for way, (change, timed) in WAYS.items()
    }
    found: dict[str, list[Tally]] = {}
    for name, (change, speed, timing) in conditions.items():
        test = features(task, encoder, 2, change, speed, timing)
        counted_N = task.counted(test)[NON_SILENCE]
        hits_N = (probe.predict(test.x_NLD) == test.y_N.numpy()).astype(float)
        found[name] = [test.tally(hits_N, counted_N)]
        print(f"{encoder.name}, {name}: {bootstrap(found[name], 100).value:.1%}", flush=True)
    return found


def main() -> int:
    """Returns exit code 0 when all conditions were measured."""
    parser = parser_of(__doc__)
    parser.add_argument("checkpoint", nargs="?", default=str(ROOT / "runs/quality/runs/quality_hubert"))
    parser.add_argument("--max-utterances", type=int, default=0, help="per split of the probe; 0 takes all")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun = time.monotonic()
    config = EvaluateConfig(checkpoint="none", manifest=str(manifest), max_utterances=given.max_utterances)
    task = TaskInputs(config, "phones", partial(print, flush=True))
    run = open_encoder(given.checkpoint)
    assert run.fresh is not None
    with few_threads(given.threads):
        encoders = [log_mel_with_context(), freeze(run.fresh(0), "random weights"), run]
        found = {encoder.name: measured(task, encoder) for encoder in encoders}
    write(found, given.out, f"{(time.monotonic() - begun) / 60:.0f} minutes", given.max_utterances)
    return 0


def write(found: dict[str, dict[str, list[Tally]]], out: Path, took: str, most: int) -> None:
    """Writes speaking_rate.json and .md: accuracy at speed 1, and points lost in each way."""
    names = list(next(iter(found.values())))[1:]
    values: dict[str, dict[str, list[float]]] = {}
    for who, tallies in found.items():
        base = tallies["1×"]
        values[who] = {"1×": [bootstrap(base, BOOTSTRAP).value]}
        for name in names:
            lost = bootstrap(base, BOOTSTRAP, tallies[name])
            values[who][name] = [lost.value, lost.low, lost.high]
    command = " ".join(["python", "benchmarks/prove/speaking_rate.py", *sys.argv[1:]])
    result = {"when": time.strftime("%Y-%m-%d"), "command": command, "max_utterances": most, "lost": values}
    out.mkdir(parents=True, exist_ok=True)
    (out / "speaking_rate.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = []
    for who, lost in values.items():
        cells = [f"{100 * v:.1f} ({100 * low:.1f} … {100 * high:.1f})" for v, low, high in (lost[n] for n in names)]
        rows.append([who, f"{lost['1×'][0]:.1%}", *cells])
    text = [
        "# Which part of another speaking rate costs accuracy?", "",
        f"`{command}`: {model_name()}, {os.cpu_count()} cores, {took}. Phones, non-silence frames, unseen speakers;",
        "the probe is fitted at speed 1. Points lost, with the 95 % interval of a paired bootstrap over speakers.",
        "", *markdown_table(["features", "1×", *names], rows), "",
        "resampled: timing and spectrum change; stretched: timing alone; shifted: spectrum alone; neither: stretched",
        "and back, which is what the phase vocoder itself costs.", "",
    ]  # fmt: skip
    (out / "speaking_rate.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
