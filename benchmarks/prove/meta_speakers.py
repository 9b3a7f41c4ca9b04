"""Measures speakers as tasks: phones of an unseen speaker after one or five of the speaker's utterances; no gate.

    python benchmarks/prove/meta_speakers.py --base runs/T             # ≤ 5 processor minutes

Speech: manifest.tsv of the folder that AURICLE_SPEECH names, with its alignment. A linear classifier of phones on one
layer of the frozen encoder is fitted to the training speakers. Three ways to classify the rest of a speaker's frames:
that classifier unadapted; after steps of gradient descent on the utterances that are given, with the number of steps
and the rate that are best for the validation speakers; and the same from a start and at rates that ANIL learned with
the training speakers as tasks. Writes benchmarks/results/meta_speakers.json and .md.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.alignments import ALIGNMENT  # noqa: E402
from benchmarks.prove.common import markdown_table, parser_of, real_speech  # noqa: E402
from benchmarks.prove.prompts import pretrained  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from pretrain.engines.inner_loop import Weights, descend  # noqa: E402
from pretrain.evaluate.config import FewShotConfig, ProbeConfig  # noqa: E402
from pretrain.evaluate.features import Labelled, Waves, phone_frames  # noqa: E402
from pretrain.evaluate.frozen_encoders import FrozenEncoder, open_encoder  # noqa: E402
from pretrain.evaluate.manifest import Interval, Utterance, read_manifest, read_phones  # noqa: E402
from pretrain.evaluate.metrics import Interval95, Tally, bootstrap  # noqa: E402
from pretrain.evaluate.probe import View, fit  # noqa: E402
from pretrain.nn.inner_rates import InnerRates  # noqa: E402

SENTENCES = "speechocean762"
LAYER, PENALTY = 3, 1e-3
FITTED = 20_000
"""Frames to which the classifier is fitted."""
UPDATES, TASKS, LR = 100, 4, 1e-3
"""Of ANIL: updates, speakers in each, and Adam's rate."""
DRAWS = 5
"""Of the utterances that are given, for each speaker."""


@dataclass(frozen=True)
class Spoken:
    """The frames of one utterance.  x_ND: standardised, divided by √D.  y_N: phones."""

    x_ND: Tensor
    y_N: Tensor


Speakers = Mapping[str, Sequence[Spoken]]


def read_speakers(
    encoder: FrozenEncoder, listed: Sequence[Utterance], phones: Mapping[str, Sequence[Interval]], waves: Waves
) -> dict[str, dict[str, list[Labelled]]]:
    """Returns the frames of every utterance of transcribed sentences, by split and speaker.

    Args:
        encoder: computes the features.
        listed: the manifest.
        phones: alignment by name.
        waves: decoded audio.
    """
    found: dict[str, dict[str, list[Labelled]]] = {"train": {}, "valid": {}, "test": {}}
    chosen = [u for u in listed if u.corpus == SENTENCES and u.name in phones]
    known = Counter(i.phone for u in chosen if u.split == "train" for i in phones[u.name])
    classes = {phone: number for number, phone in enumerate(sorted(known))}
    for utterance in chosen:
        if any(i.phone in classes for i in phones[utterance.name]):
            frames = phone_frames(encoder, [utterance], phones, classes, waves, [LAYER])
            found[utterance.split].setdefault(utterance.speaker, []).append(frames)
    return found


def fitted(train: Mapping[str, Sequence[Labelled]]) -> tuple[Weights, Callable[[Labelled], Spoken]]:
    """Fits the linear classifier of phones; returns its weights, and what scales frames for it."""
    parts = [one for speaker in sorted(train) for one in train[speaker]]
    x_NLD, y_N = torch.cat([one.x_NLD for one in parts]), torch.cat([one.y_N for one in parts])
    classes = int(y_N.max()) + 1
    some_N = torch.from_numpy(keyed_rng(0, "frames").permutation(len(y_N))[:FITTED])
    speaker_N = np.zeros(len(some_N), int)
    probe = fit(Labelled(x_NLD[some_N], y_N[some_N], speaker_N, ("all",)), classes, View((0,), PENALTY), ProbeConfig())
    root = float(x_NLD.shape[-1] ** 0.5)
    weights = {"weight": probe.weights.weight_DC.T.contiguous() * root, "bias": probe.weights.bias_C.clone()}
    return weights, lambda one: Spoken(probe.scaling(one.x_NLD)[0] / root, one.y_N)


def loss(weights: Weights, step: int, part: Sequence[Spoken]) -> Tensor:
    """Returns the mean cross-entropy of the frames of utterances; its form is that of an inner loop."""
    x_ND, y_N = torch.cat([one.x_ND for one in part]), torch.cat([one.y_N for one in part])
    return F.cross_entropy(F.linear(x_ND, weights["weight"], weights["bias"]), y_N)


def drawn(
    utterances: Sequence[Spoken], shots: int, rng: np.random.Generator
) -> tuple[Sequence[Spoken], Sequence[Spoken]]:
    """Returns the utterances of a speaker that are given, and the others."""
    order = rng.permutation(len(utterances)).tolist()
    return [utterances[number] for number in order[:shots]], [utterances[number] for number in order[shots:]]


def learned(start: Weights, train: Speakers, settings: FewShotConfig, seed: int) -> tuple[Weights, InnerRates]:
    """Returns the start and the rates of the inner loop that ANIL learns with speakers as tasks."""
    rates = InnerRates(start, settings.steps, 1.0, learned=True)
    own = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    adam = torch.optim.Adam([*own.values(), *rates.parameters()], LR)
    names = sorted(train)
    for update in range(UPDATES):
        adam.zero_grad()
        for task in range(TASKS):
            rng = keyed_rng(seed, "speakers", update, task)
            shots = int(rng.choice(settings.shots))
            given, asked = drawn(train[names[int(rng.integers(len(names)))]], shots, rng)
            inner = functools.partial(loss, part=given)
            path = descend(own, inner, rates.rate, settings.steps, second_order=True)
            torch.autograd.backward(loss(path.weights[-1], 0, asked) / TASKS)
        adam.step()
    return {name: weight.detach() for name, weight in own.items()}, rates


def adapted_hits(
    start: Weights, rate: Callable[[str, int], Tensor], steps: int, part: Speakers, shots: int, seed: int
) -> Tally:
    """Returns hits and frames of each speaker after adaptation to some of the speaker's utterances."""
    found: dict[str, tuple[float, float]] = {}
    for name in sorted(part):
        hits = frames = 0.0
        for draw in range(DRAWS):
            given, asked = drawn(part[name], shots, keyed_rng(seed, "given", name, shots, draw))
            end = descend(start, functools.partial(loss, part=given), rate, steps, differentiable=False).weights[-1]
            for one in asked:
                best_N = F.linear(one.x_ND, end["weight"], end["bias"]).argmax(1)
                hits, frames = hits + float((best_N == one.y_N).sum()), frames + len(one.y_N)
        found[name] = (hits, frames)
    return found


def measure(
    encoder: FrozenEncoder,
    listed: Sequence[Utterance],
    alignment: Path,
    settings: FewShotConfig,
    seeds: int,
    waves: Waves,
) -> dict[tuple[str, int], list[Tally]]:
    """Returns hits and frames of each test speaker of each seed, by way and number of utterances that are given."""
    read = read_speakers(encoder, listed, read_phones(alignment), waves)
    start, scaled = fitted(read["train"])
    train, valid, test = (
        {name: [scaled(one) for one in utterances] for name, utterances in read[split].items()}
        for split in ("train", "valid", "test")
    )
    found: dict[tuple[str, int], list[Tally]] = {}

    def constant(rate: float) -> Callable[[str, int], Tensor]:
        return lambda name, step: torch.tensor(rate)

    def score(shots: int, steps: int, rate: float) -> float:
        tally = adapted_hits(start, constant(rate), steps, valid, shots, 0)
        return sum(hits for hits, _ in tally.values())

    tried = [(steps, rate) for steps in (1, settings.steps) for rate in settings.rates]
    best = {shots: max(tried, key=lambda pair, shots=shots: score(shots, *pair)) for shots in settings.shots}
    for seed in range(seeds):
        own, rates = learned(start, train, settings, seed)
        for shots in settings.shots:
            steps, rate = best[shots]
            for way, begin, by, count in (
                ("unadapted", start, constant(0.0), 0),
                ("fine-tuned", start, constant(rate), steps),
                ("meta-learned", own, rates.rate, settings.steps),
            ):
                with torch.enable_grad():
                    tally = adapted_hits(begin, by, count, test, shots, seed)
                found.setdefault((way, shots), []).append(tally)
    return found


@dataclass(frozen=True)
class Row:
    """Accuracy of one way, in frames, and the same minus that of fine-tuning, paired by speaker."""

    utterances: int
    way: str
    accuracy: Interval95
    over_tuned: Interval95 | None


def rows_of(found: Mapping[tuple[str, int], Sequence[Tally]]) -> list[Row]:
    """Returns the rows of the table: means over seeds, intervals over speakers."""
    rows = []
    for (way, shots), tally in found.items():
        over = bootstrap(tally, 2_000, found["fine-tuned", shots]) if way != "fine-tuned" else None
        rows.append(Row(shots, way, bootstrap(tally, 2_000), over))
    return rows


def write(result: dict[str, Any], rows: Sequence[Row], out: Path) -> None:
    """Writes both files."""

    def points(found: Interval95 | None, sign: str = "") -> str:
        if found is None:
            return ""
        return f"{100 * found.value:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"

    out.mkdir(parents=True, exist_ok=True)
    (out / "meta_speakers.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Meta-learning: speakers as tasks", "",
        f"{result['when']}, {result['machine']}, {result['processor_minutes']} processor minutes: "
        f"`{result['command']}`", "",
        f"Phones of {result['speakers']} test speakers at 50 Hz, a linear classifier on layer {LAYER} of the frozen "
        f"encoder, {result['seeds']} seeds, {DRAWS} draws of the given utterances for each speaker; ANIL: {UPDATES} "
        f"updates of {TASKS} speakers. Base: {result['base_steps']} updates. Intervals: speakers. No gate.", "",
        *markdown_table(
            ("utterances given", "way", "accuracy in %", "above fine-tuning"),
            [(f"{row.utterances}", row.way, points(row.accuracy), points(row.over_tuned, "+")) for row in rows],
        ),
    ]  # fmt: skip
    (out / "meta_speakers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> int:
    """Returns exit code 0."""
    parser = parser_of(__doc__, "meta")
    parser.add_argument("--base", type=Path, help="a finished run of quality_hubert; default: train one")
    parser.add_argument("--base-steps", type=int, default=1_000, help="updates of the base")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    base = given.base or pretrained(manifest, given.work, given.base_steps)
    torch.set_num_threads(1)
    listed, alignment = read_manifest(manifest), manifest.parent / ALIGNMENT
    found = measure(open_encoder(str(base)), listed, alignment, FewShotConfig(), given.seeds, Waves())
    rows, spent = rows_of(found), sum(os.times()[:4])
    result = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/meta_speakers.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "processor_minutes": round(spent / 60, 1),
        "seeds": given.seeds,
        "speakers": len(next(iter(found.values()))[0]),
        "base_steps": json.loads((base / "config.json").read_text(encoding="utf-8"))["train"]["steps"],
        "rows": [asdict(row) for row in rows],
    }
    write(result, rows, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
