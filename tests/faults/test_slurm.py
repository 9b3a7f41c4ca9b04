"""A real SLURM does its worst to real runs; each ends with the bits of the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch import app, slurm
from launch.demo_corpus import synthesise
from launch.submit import read_note, steps_done
from pretrain.telemetry import read_rows
from tests.faults.mini_slurm import MiniSlurm, missing, wait_for
from tests.reader.tiny_shards import sounds, write_shards

STEPS = 60
EARLY = 8
"""A fault strikes after this step and before the first checkpoint, or …"""
LATE = 24
"""… between two checkpoints."""


@dataclass
class Site:
    """A cluster, shards, and runs on them."""

    cluster: MiniSlurm
    base: Path
    handles: dict[str, str] = field(default_factory=dict)

    def submit(self, name: str, *overrides: str) -> Path:
        """`auricle pretrain launcher=slurm` of a tiny model on two nodes."""
        plain = (
            *(
                "objective=best_rq",
                "frontend=log_mel",
                "encoder=transformer_tiny",
                "launcher=slurm",
                "engine.name=local",
            ),
            *("objective.n_codes=64", "encoder.dim=64", "encoder.layers=2", "encoder.ffn_dim=128", "encoder.heads=2"),
            *("data.batch_seconds=8", "data.micro_batches=2", "data.min_seconds=0.5", "data.max_seconds=2"),
            *(
                "data.workers=1",
                f"train.steps={STEPS}",
                "train.checkpoint_every=10",
                "schedule.warmup_steps=4",
                "schedule.name=constant",
            ),
            *("launcher.nodes=2", "launcher.minutes=10", "launcher.warn_seconds=60", "engine.timeout_minutes=2"),
        )
        paths = (f"name={name}", f"runs={self.base}", f"data.shards={self.base / 'shards'}")
        assert app.main(["pretrain", *plain, *paths, *overrides]) == 0
        folder = self.base / name
        self.handles[name] = read_note(folder).handle
        return folder

    def step(self, name: str) -> int:
        """Steps that a run has logged."""
        rows = read_rows(self.base / name / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def nodes(self, name: str) -> list[str]:
        """Where it runs, the batch script's node first."""
        listed = slurm.ask("squeue", "-h", "-o", "%N", "-j", self.handles[name]).strip()
        return slurm.ask("scontrol", "show", "hostnames", listed).split()

    def finish(self, name: str, seconds: float = 150) -> None:
        """Waits until SLURM calls the job done."""

        def ended() -> bool:
            state = slurm.job_state(self.handles[name])
            assert slurm.STATES.get(state, "failed") in ("waiting", "running", "done"), f"{state}: {self.log(name)}"
            return state == "COMPLETED"

        wait_for(ended, seconds, f"the end of {name}", lambda: self.log(name))

    def log(self, name: str) -> str:
        """What the batch script and the ranks said."""
        files = sorted((self.base / name / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2500:]}" for file in files)

    def kill_rank(self, name: str, node: str) -> None:
        """kill -9 of the run's processes on one node."""
        pids = self.cluster.processes(node, f"launch.worker {self.base / name}")
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three nodes."""
    if reason := missing():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("slurm")
    rng = random.Random(0)
    write_shards(base / "shards", [sounds([rng.uniform(0.6, 2.5) for _ in range(60)])])
    cluster = MiniSlurm(base / "c")
    patch = pytest.MonkeyPatch()
    for name, value in cluster.environment.items():
        patch.setenv(name, value)
    patch.chdir(base)
    try:
        cluster.start()
        yield Site(cluster, base)
    finally:
        cluster.stop()
        patch.undo()


@pytest.fixture(scope="module")
def runs(site: Site) -> Site:
    """Three runs side by side: a calm one, one that is warned of its time limit, one that loses a rank twice."""
    for name in ("calm", "warned", "struck"):
        site.submit(name)
    wait_for(lambda: site.step("warned") >= LATE, 90, "steps", lambda: site.log("warned"))
    slurm.ask("scancel", "--batch", "--signal=USR1", site.handles["warned"])
    wait_for(lambda: site.step("struck") >= EARLY, 60, "steps", lambda: site.log("struck"))
    site.kill_rank("struck", site.nodes("struck")[1])
    return site


def learned(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss/total"], row["opt/grad_norm"]) for row in read_rows(folder / "metrics.jsonl")]


def same_bits(site: Site, name: str) -> None:
    """The run's every loss and its last weights are those of the calm run."""
    calm, other = site.base / "calm", site.base / name
    assert [step for step, _, _ in learned(other)] == list(range(1, STEPS + 1))
    assert learned(other) == learned(calm)
    for file in ("model.safetensors", "optimizer.safetensors"):
        end = Path("checkpoints") / f"step_{STEPS:08d}" / file
        assert (other / end).read_bytes() == (calm / end).read_bytes()


def starts(folder: Path) -> int:
    return len(list((folder / "incarnations").glob("*")))


@pytest.mark.timeout(240)
def test_time_limit_checkpoints_requeues_and_resumes(runs: Site) -> None:
    runs.finish("calm")
    runs.finish("warned")
    same_bits(runs, "warned")
    log = (runs.base / "warned" / "logs" / "slurm.log").read_text()
    assert "time is nearly up" in log
    assert "ended with exit code 85" in log
    assert "start 1: 2 ranks" in log
    assert starts(runs.base / "warned") == 2


@pytest.mark.timeout(240)
def test_a_killed_rank_is_tried_again(runs: Site) -> None:
    runs.finish("calm")
    runs.finish("struck")
    same_bits(runs, "struck")
    assert "requeue (" in (runs.base / "struck" / "logs" / "slurm.log").read_text()
    assert starts(runs.base / "struck") == 2


@pytest.mark.timeout(240)
def test_a_lost_node_is_replaced(runs: Site) -> None:
    runs.finish("calm")
    folder = runs.submit("bereft")
    wait_for(lambda: runs.step("bereft") >= LATE, 60, "steps", lambda: runs.log("bereft"))
    before = runs.nodes("bereft")
    runs.cluster.power_off(before[1])
    runs.finish("bereft")
    runs.cluster.boot(before[1])
    same_bits(runs, "bereft")
    assert starts(folder) == 2


def test_scancel_ends_the_run_and_keeps_it(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site.submit("unwanted", "train.steps=100000", "train.checkpoint_every=5")
    wait_for(lambda: steps_done(folder) >= 5, 90, "a checkpoint", lambda: site.log("unwanted"))
    assert app.main(["jobs", "status", str(folder)]) == 0
    assert "running" in capsys.readouterr().out
    assert app.main(["jobs", "cancel", str(folder)]) == 0
    wait_for(lambda: slurm.job_state(site.handles["unwanted"]) == "CANCELLED", 30, "the cancelled state")
    gone = [site.cluster.processes(node, f"launch.worker {folder}") for node in site.cluster.nodes]
    assert not any(gone)
    assert app.main(["jobs", "status", str(folder)]) == app.FAILED
    assert "cancelled" in capsys.readouterr().out
    assert steps_done(folder) >= 5


def test_a_chain_stops_at_its_first_failure(site: Site) -> None:
    first = site.submit("broken", "data.shards=/nowhere")
    after = f"launcher.after={site.handles['broken']}"
    site.submit("never", after)
    wait_for(
        lambda: slurm.job_state(site.handles["never"]) == "CANCELLED",
        90,
        "the end of the chain",
        lambda: site.log("broken"),
    )
    assert slurm.job_state(site.handles["broken"]) == "FAILED"
    assert "not tried again" in (first / "logs" / "slurm.log").read_text()
    assert "there is no shard folder /nowhere" in (first / "logs" / "rank_0.log").read_text()
    assert starts(site.base / "broken") == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cut_off_node_does_no_harm(runs: Site) -> None:
    """Split brain: it computes on alone, and comes back when its job has been started elsewhere."""
    runs.finish("calm")
    folder = runs.submit("severed", "engine.timeout_minutes=0.5")
    wait_for(lambda: runs.step("severed") >= LATE, 60, "steps", lambda: runs.log("severed"))
    node = runs.nodes("severed")[0]
    runs.cluster.cut(node)
    wait_for(lambda: starts(folder) == 2, 180, "a second start", lambda: runs.log("severed"))
    runs.cluster.mend(node)
    runs.finish("severed")
    same_bits(runs, "severed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dead_slurmd_moves_the_run(runs: Site) -> None:
    runs.finish("calm")
    folder = runs.submit("orphaned", "train.steps=600", "train.checkpoint_every=100")
    wait_for(lambda: runs.step("orphaned") >= LATE, 60, "steps", lambda: runs.log("orphaned"))
    node = runs.nodes("orphaned")[1]
    runs.cluster.kill_slurmd(node)
    wait_for(lambda: starts(folder) == 2, 180, "a second start", lambda: runs.log("orphaned"))
    runs.cluster.boot(node)
    runs.finish("orphaned", 200)
    assert learned(folder)[:STEPS] == learned(runs.base / "calm")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_preprocessing_on_ray_inside_an_allocation_then_pretraining(site: Site) -> None:
    """A Ray of two nodes writes the shards that one process writes, byte for byte; a run waits for them."""
    synthesise(site.base / "speech", 24)
    plain = ("preprocess", "corpus=path", f"corpus.path={site.base / 'speech'}", "min_shards=6")
    on_slurm = ("+launcher=slurm", "launcher.nodes=2", "launcher.minutes=10")
    assert app.main([*plain, f"out={site.base / 'by_slurm'}", *on_slurm]) == 0
    folder = site.base / "runs" / "preprocess_by_slurm"
    site.handles["preprocess"] = read_note(folder).handle
    shards = f"data.shards={site.base / 'by_slurm'}"
    site.submit(
        "chained", shards, f"launcher.after={site.handles['preprocess']}", "train.steps=3", "engine.name=deepspeed"
    )
    site.finish("chained", 200)
    assert slurm.job_state(site.handles["preprocess"]) == "COMPLETED"
    assert "Ray on n1 n2" in (folder / "logs" / "slurm.log").read_text()
    assert app.main([*plain, f"out={site.base / 'by_hand'}"]) == 0
    tars = [{tar.name: tar.read_bytes() for tar in (site.base / out).glob("*.tar")} for out in ("by_slurm", "by_hand")]
    assert tars[0] == tars[1] != {}


HOSTILE = "x$(touch pwned);`touch pwned`&touch pwned|'\" %j #SBATCH --nodes=9"


def test_hostile_names_are_only_names(site: Site) -> None:
    shards = "/nowhere/$(touch pwned)"
    folder = site.submit(HOSTILE, f"data.shards={shards}", "launcher.nodes=1", "launcher.exclude=", "seed=1")
    wait_for(lambda: slurm.job_state(site.handles[HOSTILE]) == "FAILED", 60, "the end of the job")
    assert not list(site.base.rglob("pwned"))
    assert f"there is no shard folder {shards}" in (folder / "logs" / "rank_0.log").read_text()
