"""auricle search-architecture: the subnets of a supernet with the best scores at low latency, cut and distilled on."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.atomic_files import sha256_of, write_json
from data_pipeline.core.json_object import read_optional
from data_pipeline.core.schema import ConfigError, load
from launch.config import PretrainJob
from launch.runs.summary import find_run
from launch.workflows import pretraining
from launch.workflows.compressing import changed_fields, compress
from pretrain.checkpointing.locate import find_checkpoint, steps_done
from pretrain.checkpointing.weights import MODEL, LoadedCheckpoint, load_checkpoint
from pretrain.compression import architecture_search
from pretrain.compression.architecture_search import Budget, ScoredSubnet, Scores, SubnetCost
from pretrain.compression.cut import cut_subnet
from pretrain.compression.latency import LatencyModel, megabytes, subnet_timings
from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.frozen_encoders import FrozenEncoder, freeze, last_layer
from pretrain.evaluate.metrics import accuracy
from pretrain.evaluate.task_evaluation import TaskEvaluation
from pretrain.interfaces.subnets import Space, Subnet

SETTINGS, SCORES, FRONT, PLOT = "search.json", "scores.jsonl", "front.json", "front.png"


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search.

    table: JSON of `auricle bench --table RUN --subnets N`, made on the device.  budget: largest costs.  trials,
    population: subnets to score, and of a generation.  task, manifest, max_utterances: the probe, as of `auricle
    evaluate`; its score is that of speakers of the split valid.  finalists: subnets of the front that become runs.
    updates: for which each finalist is distilled on; 0: they stay as they were cut.  processes: of that training.
    """

    table: Path
    budget: Budget
    trials: int
    population: int
    seed: int
    task: str
    manifest: str
    max_utterances: int
    finalists: int
    updates: int = 0
    processes: int = 0


@dataclass(frozen=True)
class Finalist:
    """A subnet that became a run.

    measured_rtf: on this machine.  overrides: fields of its encoder, for `init=`.  distilled: the run in which it was
    distilled on, and the score of that; None where none was asked for.
    """

    run: Path
    candidate: ScoredSubnet
    measured_rtf: float
    overrides: str
    distilled: tuple[Path, float] | None = None


class FailedTrainingError(Exception):
    """A training of a finalist did not finish.  code: its exit code."""

    def __init__(self, folder: Path, code: int) -> None:
        super().__init__(f"{folder}: the training ended with exit code {code}; the same command continues it")
        self.code = code


@dataclass(frozen=True)
class FoundArchitectures:
    """Result of a search.  scored: number of subnets.  error: of the predicted latency on left-out subnets."""

    scored: int
    error: float
    front: list[ScoredSubnet]
    finals: list[Finalist]


def open_supernet(run: str) -> tuple[Path, LoadedCheckpoint, Space]:
    """Returns the newest checkpoint of a run, its content and its subnets.

    Raises:
        ConfigError: there is no such run, or it is no supernet.
    """
    path = Path(run).expanduser()
    checkpoint = find_checkpoint(str(path if path.exists() else find_run(run)))
    if not (checkpoint / "state.json").is_file():
        raise ConfigError(f"{checkpoint}: only runs of auricle can be searched; start one with init={checkpoint}")
    found = load_checkpoint(checkpoint)
    space = found.module.objective.space()
    if space is None:
        raise ConfigError(f"{run}: is no supernet; train one with +experiment=supernet_tiny (objective.elastic)")
    return checkpoint, found, space


def search_architecture(run: str, out: Path, options: SearchOptions) -> FoundArchitectures:
    """Searches a supernet, cuts finalists into runs and distils them on; the same call continues an interrupted one.

    Args:
        run: a run folder, a checkpoint, or a run's name below runs/.
        out: folder for scores, front and runs.
        options: the search.

    Raises:
        ConfigError: the run is no supernet, the table does not fit it or predicts badly, no subnet is within the
            limits, or `out` holds another search.
        FailedTrainingError: the training of a finalist did not finish.
    """
    checkpoint, found, space = open_supernet(run)
    table = read_latency_table(options.table)
    latency = LatencyModel(table, space)
    latency.require_accurate()
    _require_same(out, {"sha256": sha256_of(checkpoint / MODEL), "table": table, **_settings(options)})
    probe = functools.cache(lambda: _probe(str(checkpoint), options))
    scores = Scores(out / SCORES, lambda subnet: subnet_score(probe(), found, subnet))
    candidates = architecture_search.search_subnets(
        space,
        scores,
        cost=lambda subnet: SubnetCost(latency.real_time_factor(subnet), megabytes(found, subnet)),
        budget=options.budget,
        trials=options.trials,
        population=options.population,
        seed=options.seed,
        say=lambda line: print(line, flush=True),
    )
    if not candidates:
        raise ConfigError("no subnet that was drawn is within the limits; give more --trials, or raise them")
    front = architecture_search.front(candidates)
    finals = _cut(run, found, out, architecture_search.finalists(candidates, options.finalists), table)
    if options.updates:
        finals = [_distilled(final, checkpoint, options, probe()) for final in finals]
    write_json(out / FRONT, {
        "latency_error": latency.error,
        "scored": len(candidates),
        "front": [_row(candidate) for candidate in front],
        "finalists": [_final_row(final) for final in finals],
    })  # fmt: skip
    plot_front(candidates, front, finals, out / PLOT)
    return FoundArchitectures(len(candidates), latency.error, front, finals)


def read_latency_table(file: Path) -> dict[str, Any]:
    """Returns the content of a latency table. Raises ConfigError where it is none."""
    try:
        table = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--table {file}: cannot be read as JSON ({error})") from None
    if not isinstance(table, dict) or "subnets" not in table:
        raise ConfigError(f"--table {file}: has no whole subnets; make it by auricle bench --table RUN --subnets 40")
    return table


def subnet_encoder(found: LoadedCheckpoint, subnet: Subnet) -> FrozenEncoder:
    """Returns a subnet of a supernet with its last layer alone: an earlier one would be another subnet."""
    return last_layer(freeze(cut_subnet(found, subnet).module.model, architecture_search.subnet_label(subnet)))


def subnet_score(task: TaskEvaluation, found: LoadedCheckpoint, subnet: Subnet) -> float:
    """Returns the accuracy of a probe of a subnet, from 0 to 1."""
    return _score(task, subnet_encoder(found, subnet))


def _score(task: TaskEvaluation, encoder: FrozenEncoder) -> float:
    tallies = task.scores(lambda seed: encoder, same=True)
    return accuracy(next(iter(tallies.values())))


def distillation_job(cut_run: Path, supernet: Path, updates: int, processes: int = 0) -> PretrainJob:
    """Returns the training that distils a finalist on, with the supernet's data, teacher and optimizer.

    Args:
        cut_run: the finalist.
        supernet: checkpoint of the supernet, the teacher where the supernet was its own.
        updates: their number.
        processes: ranks; 0: as `auricle pretrain` chooses.
    """
    values = json.loads((cut_run / "config.json").read_text(encoding="utf-8"))
    values |= {"name": f"{cut_run.name}_distilled_{updates}", "runs": str(cut_run.parent), "init": str(cut_run)}
    values["objective"]["teacher"] = values["objective"]["teacher"] or str(supernet)
    values["train"]["steps"] = updates
    values["schedule"]["warmup_steps"] = min(values["schedule"]["warmup_steps"], updates // 10)
    return load(PretrainJob, values | {"launcher": {"name": "local", "processes": processes}})


def _distilled(final: Finalist, supernet: Path, options: SearchOptions, task: TaskEvaluation) -> Finalist:
    """Distils a finalist on, unless that is finished, and scores it."""
    job = distillation_job(final.run, supernet, options.updates, options.processes)
    folder = final.run.parent / job.name
    if steps_done(folder) < options.updates and (code := pretraining.start(job)):
        raise FailedTrainingError(folder, code)
    model = load_checkpoint(find_checkpoint(str(folder))).module.model
    return dataclasses.replace(final, distilled=(folder, _score(task, last_layer(freeze(model, job.name)))))


def _probe(checkpoint: str, options: SearchOptions) -> TaskEvaluation:
    values = {
        "checkpoint": checkpoint, "task": options.task, "manifest": options.manifest, "ask": "valid", "seeds": 1,
        "baselines": False, "max_utterances": options.max_utterances,
    }  # fmt: skip
    return TaskEvaluation(load(EvaluateConfig, values), options.task, lambda line: None)


def _settings(options: SearchOptions) -> dict[str, Any]:
    """Returns what an interrupted search must have in common with the one that continues it."""
    values = dataclasses.asdict(options)
    free = ("table", "trials", "finalists", "updates", "processes")
    return {name: value for name, value in values.items() if name not in free}


def _require_same(out: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings in a new folder; in another search's, raises ConfigError with the fields that differ."""
    file = out / SETTINGS
    before = read_optional(file, "remove the folder and search again")
    if before is None:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out}: exists and holds no search; give a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    differing = [name for name in settings if json.loads(json.dumps(settings[name])) != before.get(name)]
    if differing:
        raise ConfigError(f"{out}: holds a search with another {', '.join(differing)}; give a new folder")


def _cut(
    run: str, found: LoadedCheckpoint, out: Path, chosen: Sequence[ScoredSubnet], table: dict[str, Any]
) -> list[Finalist]:
    """Writes a run of each finalist, unless it is there, and measures all of them."""
    options = {"seconds": table["seconds"], "threads": table["threads"]}
    rows = subnet_timings(found, [candidate.subnet for candidate in chosen], **options)["subnets"]
    column = 3 if table["threads"] == 1 else 1  # as in LatencyModel: processor time of one thread
    finals = []
    for candidate, row in zip(chosen, rows, strict=True):
        name = "cut_" + "_".join(f"{heads}x{ffn}" for heads, ffn in candidate.subnet)
        widths = out / f"{name}.json"
        widths.write_text(json.dumps(candidate.subnet) + "\n", encoding="utf-8")
        if not (out / name).exists():
            compress(run, out / name, widths=widths)
        overrides = changed_fields(found.config, out / name)
        finals.append(Finalist(out / name, candidate, row[column] / 1e3 / table["seconds"], overrides))
    return finals


def _row(candidate: ScoredSubnet) -> dict[str, Any]:
    widths = [list(pair) for pair in candidate.subnet]
    return {"widths": widths, "score": candidate.score, **candidate.cost._asdict()}


def _final_row(final: Finalist) -> dict[str, Any]:
    row = _row(final.candidate) | {"run": final.run.name, "measured_rtf": final.measured_rtf}
    if final.distilled is not None:
        row |= {"distilled_run": final.distilled[0].name, "distilled_score": final.distilled[1]}
    return row


def plot_front(
    candidates: Sequence[ScoredSubnet], front: Sequence[ScoredSubnet], finals: Sequence[Finalist], file: Path
) -> None:
    """Draws scores over predicted latency, the front as a line, and finalists at their measured latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([c.cost.rtf for c in candidates], [100 * c.score for c in candidates], s=12, color="0.6")
    axes.step([c.cost.rtf for c in front], [100 * c.score for c in front], where="post", label="front")
    measured = [final.measured_rtf for final in finals]
    axes.scatter(
        measured, [100 * f.candidate.score for f in finals], marker="x", color="C3", label="finalists, measured"
    )
    if trained := [(final.measured_rtf, 100 * final.distilled[1]) for final in finals if final.distilled is not None]:
        axes.scatter(*zip(*trained, strict=True), marker="^", color="C2", label="distilled on")
    axes.set_xlabel("seconds of computing per second of audio")
    axes.set_ylabel("score, %")
    axes.legend()
    figure.savefig(file, dpi=120)
