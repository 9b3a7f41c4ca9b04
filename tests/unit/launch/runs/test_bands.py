"""Bands of seeds: their arithmetic, values outside of them, and the files of tiny recipes as thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError
from launch.commands import bands as command
from launch.commands.board import add_bands
from launch.runs import bands
from tests.support.learning import BANDS, OBJECTIVES, learn

LEARNING = ("loss/total", "metric/accuracy")
"""Curves that show learning; the codes of a fixed quantiser do not."""
RNG = np.random.default_rng(0)


def write_run(folder: Path, losses: list[float], probes: dict[int, float] | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss/total": loss}) for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text("{}")
    found = [json.dumps({"step": step, "name": "phones/all_frames", "value": v}) for step, v in (probes or {}).items()]
    (folder / "evaluations.jsonl").write_text("\n".join(found) + "\n")
    return folder


def test_band_of_known_values() -> None:
    """Of 1, 2, 3: mean 2, deviation 1, and t(2) = 4.303 times the root of 1 + 1/3."""
    made = bands.band([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], [10, 20])
    assert made.mean == [2.0, 5.0]
    assert made.deviation == pytest.approx([1.0, 0.0])
    assert made.high[0] == pytest.approx(2 + 4.303 * (4 / 3) ** 0.5, abs=1e-3)
    assert made.low[1] == made.high[1] == 5.0
    assert bands.at(made, 15)[0] == 3.5
    assert bands.at(made, 5)[0] == 2.0
    assert bands.at(made, 99)[0] == 5.0


@pytest.mark.parametrize("freedom", [1, 4, 10, 11, 15, 30, 1_000])
def test_quantiles_are_those_of_scipy(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert bands.student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_a_band_holds_95_of_100_further_seeds() -> None:
    inside = 0
    for _ in range(2_000):
        values = RNG.normal(3, 0.5, 6)
        made = bands.band([[value] for value in values[:5].tolist()], [1])
        inside += made.low[0] <= values[5] <= made.high[0]
    assert inside / 2_000 == pytest.approx(0.95, abs=0.015)


def test_runs_are_compared_with_the_spread_of_seeds(tmp_path: Path) -> None:
    base = np.linspace(4, 2, 100)
    runs = [
        write_run(tmp_path / f"seed_{n}", (base + shift).tolist(), {50: 0.3 + shift, 100: 0.4 + shift})
        for n, shift in enumerate((-0.02, 0.0, 0.02))
    ]
    found = bands.measure("mine", "auricle bands …", [0, 1, 2], runs)
    bands.write(found, tmp_path / "mine.json")
    assert bands.read(tmp_path / "mine.json") == found
    assert set(found.curves) == {"loss/total", "evaluate/phones/all_frames"}
    assert len(found.curves["loss/total"].step) == 50
    near = write_run(tmp_path / "near", (base + 0.03).tolist())
    far = write_run(tmp_path / "far", (base + 0.5).tolist())
    assert bands.curves_outside(found, near) == []
    [line] = bands.curves_outside(found, far)
    assert line.startswith("loss/total at step 100")
    assert "within ±" in bands.larger_than_seeds(found, "loss/total", (runs[0], near))
    assert "+0.52 at step 100, larger than ±" in bands.larger_than_seeds(found, "loss/total", (runs[0], far))
    assert bands.larger_than_seeds(found, "metric/accuracy", (runs[0], far)) == ""


def test_a_board_shows_the_band_behind_the_curve_of_a_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    runs = [write_run(tmp_path / f"seed_{n}", [4.0, 3.0 + 0.1 * n]) for n in range(2)]
    bands.write(bands.measure("mine", "", [0, 1], runs), tmp_path / "mine.json")
    (tmp_path / "home").mkdir()
    assert add_bands(runs[:1], tmp_path / "home", tmp_path / "mine.json") == 1
    events = EventAccumulator(str(tmp_path / "home" / "seed_0_band"))
    events.Reload()
    curve, low, high = (
        [event.value for event in events.Scalars(tag)]
        for tag in ("loss/total", "band_low/loss/total", "band_high/loss/total")
    )
    assert curve == pytest.approx([4.0, 3.0])
    assert low[1] < 3.0 < high[1]
    [tensor] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    [series] = layout.category[0].chart[0].margin.series
    assert (series.value, series.lower, series.upper) == ("loss/total", "band_low/loss/total", "band_high/loss/total")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["seeds=1"], "needs two different seeds"), (["seeds=1,1"], "needs two"), (["seeds=a,2"], "must be numbers")],
)
def test_wrong_seeds_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        command.run(["+experiment=best_rq_tiny", *arguments])


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not a file of `auricle bands`"):
        bands.read(tmp_path / "x.json")


QUICK = ("best_rq", "wav2vec2", "hubert", "data2vec", "dinosr", "efficient")


@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in OBJECTIVES]
)
def test_objectives_still_learn(objective: str, tmp_path: Path) -> None:
    """Loss and accuracy of a seed that is not in the committed band end within it."""
    known = bands.read(BANDS / f"{objective}.json")
    assert 7 not in known.seeds
    assert bands.curves_outside(known, learn(objective, tmp_path / "run", seed=7), LEARNING) == []


@pytest.mark.parametrize(
    "objective",
    [pytest.param(name, marks=() if name in ("best_rq", "hubert") else pytest.mark.slow) for name in OBJECTIVES],
)
def test_a_run_that_does_not_learn_is_outside_of_the_band(objective: str, tmp_path: Path) -> None:
    still = learn(objective, tmp_path / "run", seed=7, lr=1e-9)
    assert bands.curves_outside(bands.read(BANDS / f"{objective}.json"), still, LEARNING)
