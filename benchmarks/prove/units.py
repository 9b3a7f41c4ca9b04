"""Trains text to units to audio, and units to text, on strings of digits; recognisers listen.

    python benchmarks/prove/units.py                  # about 15 minutes of one core
    python benchmarks/prove/units.py --trained        # measures what an earlier call trained in --work

The data are those of benchmarks/prove/synthesis.py: strings of digits of one speaker of the Free Spoken Digit Dataset,
and as many of one or two digits, which are learned first since they are short. Units are k-means clusters of MFCC, 25
a second, with one unit for silence. PocketSphinx, which accepts any string of digits, listens to

    recording                 strings of recordings that were not trained on
    units of the recording    their units made to audio
    text                      units drawn for their text, made to audio
    shuffled                  the same units in a random order: chance

and the head `units` with direction=units_to_text writes the texts of recordings. Writes benchmarks/results/units.md
and .json; --beside names the results of benchmarks/prove/synthesis.py, of which the non-autoregressive voice is taken.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import parser_of, quiet_auricle, real_speech  # noqa: E402
from benchmarks.prove.synthesis import DIGITS, TEST_TAKES, String, read_takes, strings, write_shards  # noqa: E402
from data_pipeline.core.jsonl import read_rows  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from data_pipeline.labels.unit_labels import UnitLabeller, open_labeller  # noqa: E402
from pretrain.evaluate.metrics import bootstrap  # noqa: E402
from pretrain.evaluate.synthesis import pocketsphinx  # noqa: E402
from pretrain.generation.unit_reader import open_reader  # noqa: E402
from pretrain.generation.units import unit_frames  # noqa: E402
from pretrain.generation.voice import UnitVoice, open_speaker  # noqa: E402
from pretrain.inference.sampling import NoEndError, Sampling  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402
from pretrain.recognition.error_rates import edits  # noqa: E402

SMALL = (
    "encoder.dim=64",
    "encoder.layers=1",
    "encoder.heads=2",
    "encoder.ffn_dim=128",
    "objective=none",
    "~objective.n_codes",
    "data.batch_seconds=16",
    "data.micro_batches=1",
)
SILENCE_DB = 35
"""Below the loudest frame: silence of noise is one unit and not several by chance."""
ONE_CORE = ("engine.name=torch", "data.workers=0", "launcher=local", "launcher.threads=1", "train.media_every=0")


def main() -> int:
    """Trains, listens and writes; returns the exit code."""
    parser = parser_of(__doc__, "units")
    parser.add_argument("--speaker", default="fsdd-jackson")
    parser.add_argument("--updates", type=int, default=1_200, help="of text to units and audio (default: 1,200)")
    parser.add_argument("--text-updates", type=int, default=1_000, help="of units to text (default: 1,000)")
    parser.add_argument("--train", type=int, default=400, help="strings of 3 to 5 digits for training (default: 400)")
    parser.add_argument("--short", type=int, default=400, help="shorter strings for training (default: 400)")
    parser.add_argument("--rate", type=int, default=25, help="units per second (default: 25)")
    parser.add_argument("--test", type=int, default=60, help="strings to listen to (default: 60)")
    parser.add_argument("--classes", type=int, default=100, help="different units (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.5, help="of the draws (default: 0.5)")
    parser.add_argument("--beside", type=Path, help="synthesis.json of benchmarks/prove/synthesis.py")
    parser.add_argument("--trained", action="store_true", help="measure the runs that an earlier call left in --work")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    torch.set_num_threads(1)
    takes = read_takes(manifest, given.speaker)
    test = strings({digit: waves[-TEST_TAKES:] for digit, waves in takes.items()}, given.test, "test")
    runs = given.work / "runs"
    if not given.trained:
        shutil.rmtree(given.work, ignore_errors=True)
        heard = {digit: waves[:-TEST_TAKES] for digit, waves in takes.items()}
        made = [*strings(heard, given.train, "train"), *strings(heard, given.short, "short", 1, 2)]
        data = prepare(made, given.work, given.classes, given.rate)
        for direction, steps in (("text_to_units", given.updates), ("units_to_text", given.text_updates)):
            train(data, runs, direction, steps)
    label = open_labeller(str(given.work / "units"))
    found = open_speaker(str(runs / "text_to_units"))
    assert isinstance(found, UnitVoice)
    voice = UnitVoice(**{**vars(found), "sampling": Sampling(given.temperature, 0.9, 0)})
    rates, failures, factor = listen(voice, label, test)
    rates["speech to text, by the head in the other direction"], unread = read(runs, label, test, given.temperature)
    values = {
        "command": "python benchmarks/prove/units.py " + " ".join(sys.argv[1:]),
        "speaker": given.speaker, "classes": given.classes, "rate_hz": given.rate, "temperature": given.temperature,
        "training": {name: trained(runs / name) for name in ("text_to_units", "units_to_text")},
        "digit_error": rates, "texts without an end": failures, "recordings without an end": unread,
        "real_time_factor": factor, "machine": model_name(),
    }  # fmt: skip
    if given.beside:
        beside = json.loads(given.beside.read_text(encoding="utf-8"))["digit_error"]
        values["non_autoregressive"] = beside["text, trained vocoder"]
    report(given.out, values)
    return 0


def prepare(made: Sequence[String], work: Path, classes: int, rate_hz: int) -> list[str]:
    """Writes shards, tokens and units; returns the settings of a run that name them."""
    shards, tokens = write_shards(made, work)
    units = work / "units"
    kind = ["features=mfcc", f"rate_hz={rate_hz}", f"silence_db={SILENCE_DB}", f"classes={classes}"]
    quiet_auricle("targets", f"shards={shards}", f"out={units}", *kind, f"runs={work}")
    places = [f"data.shards={shards}", f"data.tokens.text={tokens}", f"data.targets.units={units}"]
    return [*places, f"heads.speak.units={classes}", f"heads.speak.label_rate_hz={rate_hz}"]


def train(data: Sequence[str], runs: Path, direction: str, steps: int) -> None:
    """Trains `units_tiny` for so many updates, without a self-supervised loss, and notes the processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    length = [f"train.steps={steps}", f"schedule.warmup_steps={max(1, steps // 20)}", f"train.checkpoint_every={steps}"]
    way = [f"heads.speak.direction={direction}"]
    if direction == "units_to_text":
        way.append("heads.speak.audio=null")
    more = [*ONE_CORE, "train.log_every=10", *SMALL, f"runs={runs}", f"name={direction}"]
    quiet_auricle("pretrain", "+experiment=units_tiny", *data, *length, *way, *more)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (runs / direction / "processor_seconds").write_text(f"{seconds:.0f}\n", encoding="ascii")


def trained(run: Path) -> dict[str, float]:
    """Returns the updates of a run, their processor time, and the means of the last 10 values of its metrics."""
    rows = read_rows(run / "metrics.jsonl")
    seconds = float((run / "processor_seconds").read_text(encoding="ascii"))
    names = [name for name in rows[-1] if name.startswith("metric/speak/")]
    last = {name.split("/")[-1]: statistics.fmean(row[name] for row in rows[-10:]) for name in names}
    return {"updates": rows[-1]["step"], "processor_seconds": seconds, **last}


def listen(
    voice: UnitVoice, label: UnitLabeller, test: Sequence[String]
) -> tuple[dict[str, list[float]], int, float | None]:
    """Returns digit errors with 95 % intervals, the texts without an end, and the real-time factor, if any ends.

    A text for which no end was drawn is silent, that is, all of its digits are wrong.
    """
    prompt = voice.encode(test[0].wave_T)
    prompted = UnitVoice(**{**vars(voice), "prompt": prompt})
    drawn: dict[str, list[list[int]]] = {}
    failures, spent, spoken = 0, 0.0, 0
    for string in test:
        began = time.perf_counter()
        try:
            drawn[string.text] = unit_frames(voice.head, voice.tokenizer.encode(string.text), prompt, voice.sampling)
        except NoEndError:
            failures += 1
            drawn[string.text] = [[0]]
        spoken += len(sound(prompted, drawn[string.text]))
        spent += time.perf_counter() - began
    rng = keyed_rng(0, "shuffled")
    kinds: dict[str, Callable[[String], np.ndarray]] = {
        "recording": lambda string: string.wave_T,
        "units of the recording": lambda string: sound(prompted, [label(string.wave_T).tolist()]),
        "text": lambda string: sound(prompted, drawn[string.text]),
        "shuffled": lambda string: sound(prompted, [rng.permutation(drawn[string.text][0]).tolist()]),
    }
    recogniser, rates = pocketsphinx(DIGITS), {}
    for kind, make in kinds.items():
        rates[kind] = rate(test, [recogniser(make(string)) for string in test])
        print(f"{kind}: digit error {rates[kind]}", flush=True)
    return rates, failures, spent / (spoken / 16_000) if failures < len(test) else None


@torch.inference_mode()
def sound(voice: UnitVoice, levels: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the audio of frame labels."""
    return voice.wave(voice.mel_of(levels))


def rate(test: Sequence[String], texts: Sequence[str]) -> list[float]:
    """Returns the digit error with its 95 % interval over strings."""
    counts = edits([string.text for string in test], texts, by_words=True)
    tally = {str(number): (float(wrong), float(count)) for number, (wrong, count) in enumerate(counts)}
    found = bootstrap([tally], 2_000)
    return [found.value, found.low, found.high]


def read(runs: Path, label: UnitLabeller, test: Sequence[String], temperature: float) -> tuple[list[float], int]:
    """Returns the digit error of texts written from recordings, and the number of recordings without an end."""
    reader = open_reader(str(runs / "units_to_text"))
    texts, failures = [], 0
    for string in test:
        try:
            texts.append(reader.text(string.wave_T, Sampling(0.0, 1.0, 0)))
        except NoEndError:
            failures += 1
            texts.append("")
    found = rate(test, texts)
    print(f"speech to text: digit error {found}", flush=True)
    return found, failures


def report(out: Path, values: dict[str, Any]) -> None:
    """Writes the table and its numbers."""
    to_units, to_text = values["training"]["text_to_units"], values["training"]["units_to_text"]
    rows = [(kind, *found) for kind, found in values["digit_error"].items()]
    if "non_autoregressive" in values:
        rows.insert(3, ("text, non-autoregressive (synthesis.md)", *values["non_autoregressive"]))
    lines = [
        "# Acoustic units: text to units to audio, and units to text",
        "",
        f"`{values['command'].strip()}`, one core ({values['machine']}); {values['speaker']}, {values['classes']} "
        f"units at {values['rate_hz']} Hz, `units_tiny` without a self-supervised loss; to units and audio "
        f"{to_units['updates']} updates in {to_units['processor_seconds'] / 60:.1f} minutes of processor time, to text "
        f"{to_text['updates']} in {to_text['processor_seconds'] / 60:.1f}. PocketSphinx listens, any string of digits. "
        "Results for digits of one speaker at 8 kHz do not extend to dictation.",
        "",
        "| audio | digit error | 95 % over strings |",
        "|---|---|---|",
        *(f"| {kind} | {value:.1%} | {low:.1%} … {high:.1%} |" for kind, value, low, high in rows),
        "",
        f"Units are drawn at temperature {values['temperature']:g}, top_p 0.9. No end was drawn for "
        f"{values['texts without an end']} texts, nor written for {values['recordings without an end']} recordings; "
        f"all their digits count as wrong. Real-time factor of text to audio on one core: "
        f"{values['real_time_factor'] or float('nan'):.2f}. Accuracy of the next unit in training: "
        f"{to_units['accuracy']:.1%}, of the next letter: {to_text['accuracy']:.1%}.",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "units.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "units.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
