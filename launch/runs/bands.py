"""Bands: how much the curves of one recipe differ between seeds, and whether a difference is larger than that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.json_object import read_object
from data_pipeline.core.schema import ConfigError, about, config, dump, load
from launch.runs.summary import number, rows

MEASURED: Final = ("loss/total", "metric/accuracy", "metric/perplexity")
"""Curves of metrics.jsonl with a band; the metrics of single code books begin like the last one."""
POINTS: Final = 50
"""Most points of a curve; each is the mean of neighbouring logged steps."""
T_95: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, two-sided 95 %, for 1 to 10 degrees of freedom."""


@config
class Band:
    """The spread of one curve over seeds, point by point."""

    step: Annotated[list[int], about("last step of each point")]
    mean: Annotated[list[float], about("mean over the seeds")]
    deviation: Annotated[list[float], about("standard deviation over the seeds, n - 1")]
    low: Annotated[list[float], about("a further seed is above this with 97.5 %, if values are normal")]
    high: Annotated[list[float], about("and below this")]


@config
class Bands:
    """The content of a bands file."""

    recipe: Annotated[str, about("name of the recipe")]
    command: Annotated[str, about("command that made it")]
    seeds: Annotated[list[int], about("seeds of the runs")]
    curves: Annotated[dict[str, Band], about("metric -> its band; evaluate/TASK/MEASURE for probes")]


def student_t(freedom: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t (Cornish-Fisher beyond the table, within 0.2 %)."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def curve(run: Path, name: str, points: int = POINTS) -> dict[int, float]:
    """Returns a curve of a run, step to value, where neighbouring logged steps are averaged to at most `points`."""
    if name.startswith("evaluate/"):
        found = [row for row in rows(run, "evaluations.jsonl") if f"evaluate/{row.get('name')}" == name]
        return {int(row["step"]): number(row, "value") for row in found}
    known = [(int(row["step"]), number(row, name)) for row in rows(run) if name in row]
    size = -(-len(known) // points) or 1
    groups = [known[at : at + size] for at in range(0, len(known), size)]
    return {group[-1][0]: math.fsum(value for _, value in group) / len(group) for group in groups}


def names_of(run: Path) -> list[str]:
    """Returns the names of the curves of a run that get a band."""
    logged = dict.fromkeys(name for row in rows(run)[-1:] for name in row if name.startswith(MEASURED))
    return [*logged, *dict.fromkeys(f"evaluate/{row['name']}" for row in rows(run, "evaluations.jsonl"))]


def measure(recipe: str, command: str, seeds: Sequence[int], runs: Sequence[Path]) -> Bands:
    """Computes the bands of runs that differ in the seed alone.

    Args:
        recipe: its name.
        command: command that trained the runs.
        seeds: their seeds.
        runs: their folders.

    Raises:
        ConfigError: there are fewer than two runs, or they share no step of any curve.
    """
    if len(runs) < 2:
        raise ConfigError(f"bands need two runs or more, not {len(runs)}")
    found: dict[str, Band] = {}
    for name in names_of(runs[0]):
        curves = [curve(run, name) for run in runs]
        shared = sorted(set.intersection(*(set(one) for one in curves)))
        if shared:
            found[name] = band([[one[step] for step in shared] for one in curves], shared)
    if not found:
        raise ConfigError("bands: the runs have no logged step in common")
    return Bands(recipe=recipe, command=command, seeds=list(seeds), curves=found)


def band(values: Sequence[Sequence[float]], steps: Sequence[int]) -> Band:
    """Returns the band of curves (seeds × points): interval of a further seed, mean ± t · s · √(1 + 1/n)."""
    count = len(values)
    reach = student_t(count - 1) * math.sqrt(1 + 1 / count)
    means = [math.fsum(point) / count for point in zip(*values, strict=True)]
    spread = [
        math.sqrt(math.fsum((value - mean) ** 2 for value in point) / (count - 1))
        for point, mean in zip(zip(*values, strict=True), means, strict=True)
    ]
    return Band(
        step=list(steps),
        mean=means,
        deviation=spread,
        low=[mean - reach * s for mean, s in zip(means, spread, strict=True)],
        high=[mean + reach * s for mean, s in zip(means, spread, strict=True)],
    )


def write(bands: Bands, file: Path) -> None:
    """Writes a bands file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, dump(bands))


def read(file: Path) -> Bands:
    """Reads a bands file. Raises ConfigError if it is none."""
    try:
        values = read_object(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a file of `auricle bands` ({error})") from None
    return load(Bands, values, f"{file}: not a file of `auricle bands`")


def at(band: Band, step: int) -> tuple[float, float, float, float]:
    """Returns (mean, deviation, low, high) at a step, between points by a straight line."""
    steps = band.step
    after = next((i for i, known in enumerate(steps) if known >= step), len(steps) - 1)
    before = max(0, after - 1) if steps[after] > step else after
    width = steps[after] - steps[before]
    share = 0.0 if not width or step >= steps[after] else (step - steps[before]) / width
    if not width or step >= steps[after]:
        before, share = after, 0.0
    mean, deviation, low, high = (
        values[before] + share * (values[after] - values[before])
        for values in (band.mean, band.deviation, band.low, band.high)
    )
    return mean, deviation, low, high


def curves_outside(bands: Bands, run: Path, names: Sequence[str] = ()) -> list[str]:
    """Returns a line for each curve of a run whose last point is outside of its band; names: only these curves."""
    found = []
    for name, one in bands.curves.items():
        values = curve(run, name)
        if not values or (names and name not in names):
            continue
        step = max(values)
        mean, _, low, high = at(one, step)
        if not low <= values[step] <= high:
            found.append(f"{name} at step {step}: {values[step]:.4g} is outside of {low:.4g} … {high:.4g} ({mean:.4g})")
    return found


def larger_than_seeds(bands: Bands, name: str, runs: Sequence[Path]) -> str:
    """Returns whether the last values of two runs differ by more than two seeds do in 95 % of cases, t · s · √2."""
    one, other = (curve(run, name) for run in runs)
    shared = set(one) & set(other)
    if name not in bands.curves or not shared:
        return ""
    step = max(shared)
    gap = other[step] - one[step]
    _, deviation, _, _ = at(bands.curves[name], step)
    limit = student_t(len(bands.seeds) - 1) * deviation * math.sqrt(2)
    verdict = "larger than" if abs(gap) > limit else "within"
    return f"{gap:+.4g} at step {step}, {verdict} ±{limit:.4g} of {len(bands.seeds)} seeds"
