"""Faults on a real SLURM cluster: each run ends with a result bit-identical to that of the undisturbed run."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import main
from launch.demo_corpus import synthesise
from launch.exit_codes import ExitCode
from launch.launchers import slurm
from launch.runs.job_record import read_record
from launch.workflows.pipeline import PipelineStep
from pretrain.checkpointing.locate import steps_done
from tests.support.corpora import preprocess_here
from tests.support.faults import mini_slurm
from tests.support.faults.keys import handed_over
from tests.support.faults.mini_slurm import require_slurm, wait_for
from tests.support.faults.site import ON_SLURM, STEPS, TOY, ZERO, Site, learned, site_at, starts, variable

EARLY = 8
"""Step after which a fault is injected before the first checkpoint."""
LATE = 24
"""Step after which a fault is injected between two checkpoints."""

HOSTILE = "x$(touch pwned);`touch pwned`&touch pwned|'\" %j #SBATCH --nodes=9"
HOSTILE_SHARDS = "/nowhere/$(touch pwned)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Starts a cluster of twelve nodes."""
    require_slurm()
    with site_at(tmp_path_factory.mktemp("slurm"), 12) as site:
        yield site


@pytest.fixture(scope="module")
def runs(site: Site) -> Site:
    """Starts in parallel: an undisturbed run, one that loses a rank, and a chain of jobs."""
    synthesise(site.base / "speech", 12)
    for name in ("calm", "struck"):
        site.submit(name)
    assert main.main(pipeline(site)) == 0
    site.reach("struck", EARLY)
    site.kill_rank("struck", site.nodes("struck")[1])
    return site


def pipeline(site: Site) -> list[str]:
    """Returns the command for preprocessing on a Ray cluster of two nodes and a dependent run."""
    folder = site.base / "chain"
    toy = [f"pretrain.{line}" for line in TOY]
    corpus = [f"preprocess.corpus.path={site.base / 'speech'}", "preprocess.min_shards=4"]
    one_node = ["pretrain.launcher.nodes=1", "pretrain.train.steps=4", "pretrain.name=chained"]
    return ["pipeline", f"folder={folder}", "steps=[preprocess,pretrain]", *ON_SLURM, *corpus, *toy, *one_node]


@pytest.fixture(scope="module")
def runs_with_lost_nodes(runs: Site) -> Site:
    """Starts in parallel: a run whose second node loses power, and one whose second node loses its slurmd."""
    runs.finish("calm")
    for name in ("bereft", "orphaned"):
        runs.submit(name)
    for name in ("bereft", "orphaned"):
        runs.reach(name, LATE)
    lost = runs.nodes("bereft")[1]
    runs.cluster.power_off(lost)
    dead, pids = runs.lose_slurmd("orphaned")
    runs.continue_run("orphaned", pids)
    for name in ("bereft", "orphaned"):
        runs.finish(name)
    for node in (lost, dead):
        runs.cluster.boot(node)
    return runs


@pytest.fixture(scope="module")
def others(runs: Site) -> Site:
    """Submits a sweep, a diverging run, one with hostile names, and one that depends on a failing job."""
    site = runs
    plain = (*ON_SLURM, f"runs={site.base}", f"data.shards={site.base / 'shards'}", "launcher.nodes=1")
    assert main.main(["pretrain", *TOY, *plain, "name=swept", "train.steps=3", "seed=1,2", "--multirun"]) == 0
    for number in (0, 1):
        site.handles[f"swept_{number}"] = read_record(site.base / f"swept_{number}").handle
    site.submit("ill", "launcher.nodes=1", "optimizer.lr=1e12", "schedule.warmup_steps=0")
    site.submit(HOSTILE, f"data.shards={HOSTILE_SHARDS}", "launcher.nodes=1")
    site.submit("broken", "data.shards=/nowhere", "launcher.nodes=1")
    site.submit("never", f"launcher.after={site.handles['broken']}", "launcher.nodes=1")
    return site


def same_bits(site: Site, name: str, undisturbed: str = "calm") -> None:
    """Asserts that keys, losses and final weights of a run are bit-identical to those of the undisturbed one."""
    calm, other = site.base / undisturbed, site.base / name
    assert handed_over(other) == handed_over(calm)
    assert len(handed_over(other)) == 2 * STEPS, "two micro-batches per step"
    assert [step for step, _, _ in learned(other)] == list(range(1, STEPS + 1))
    assert learned(other) == learned(calm)
    for file in ("model.safetensors", "optimizer.safetensors"):
        end = Path("checkpoints") / f"step_{STEPS:08d}" / file
        assert (other / end).read_bytes() == (calm / end).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_at_its_time_limit_saves_is_requeued_and_resumes(runs: Site) -> None:
    runs.finish("calm")
    runs.submit("warned")
    runs.reach("warned", LATE)
    slurm.ask("scancel", "--batch", "--signal=USR1", runs.handles["warned"])
    runs.finish("warned")
    same_bits(runs, "warned")
    log = (runs.base / "warned" / "logs" / "slurm.log").read_text()
    assert "the time limit is near" in log
    assert "ended with exit code 85" in log
    assert "start 1: 2 ranks" in log
    assert starts(runs.base / "warned") == 2


@pytest.mark.timeout(240)
def test_a_run_with_a_killed_rank_is_retried(runs: Site) -> None:
    runs.finish("calm")
    runs.finish("struck")
    same_bits(runs, "struck")
    assert "starting again after" in (runs.base / "struck" / "logs" / "slurm.log").read_text()
    assert starts(runs.base / "struck") == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["bereft", "orphaned"])
def test_a_run_that_loses_a_node_or_slurmd_is_requeued(runs_with_lost_nodes: Site, name: str) -> None:
    same_bits(runs_with_lost_nodes, name)
    assert starts(runs_with_lost_nodes.base / name) == 2
    assert "start 1: 2 ranks" in (runs_with_lost_nodes.base / name / "logs" / "slurm.log").read_text()


@pytest.mark.timeout(400)
def test_preprocessing_on_ray_inside_an_allocation_then_pretraining(
    runs: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray on two nodes writes the same bytes as one process; a run depends on them; a repeat skips both."""
    folder = runs.base / "chain"
    for name in ("preprocess", "chained"):
        runs.handles[f"chain/runs/{name}"] = read_record(folder / "runs" / name).handle
    runs.finish("chain/runs/chained", 300)
    assert runs.state("chain/runs/preprocess") == "COMPLETED"
    assert "Ray on n" in (folder / "runs" / "preprocess" / "logs" / "slurm.log").read_text()
    by_hand = ("corpus=path", f"corpus.path={runs.base / 'speech'}", "min_shards=4", f"out={runs.base / 'by_hand'}")
    preprocess_here(PipelineStep("preprocess", by_hand).job())
    tars = [
        {tar.name: tar.read_bytes() for tar in out.glob("*.tar")} for out in (folder / "shards", runs.base / "by_hand")
    ]
    assert tars[0] == tars[1] != {}
    capsys.readouterr()
    assert main.main(pipeline(runs)) == 0
    said = capsys.readouterr().out
    assert "preprocess: up to date, skipped" in said
    assert "chained: up to date, skipped" in said
    assert "job" not in said


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_is_a_job_array(others: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        assert others.handles[f"swept_{number}"].partition("_")[2] == str(number)
        others.finish(f"swept_{number}")
    assert learned(others.base / "swept_0") != learned(others.base / "swept_1")
    assert main.main(["jobs", "status", str(others.base / "swept_1")]) == 0
    assert "done, step 3/3" in capsys.readouterr().out


@pytest.mark.timeout(400)
def test_an_unhealthy_run_is_not_retried(others: Site) -> None:
    """The learning rate is so large that the loss soon becomes NaN."""
    wait_for(
        lambda: others.state("ill") == "FAILED",
        120,
        "the end of the job",
        lambda: others.log("ill"),
    )
    assert "the run is unhealthy: not tried again" in (others.base / "ill" / "logs" / "slurm.log").read_text()
    assert starts(others.base / "ill") == 1


def test_scancel_ends_the_run_and_keeps_its_checkpoints(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site.submit("unwanted", "train.steps=100000", "train.checkpoint_every=5", "launcher.nodes=1")
    wait_for(lambda: steps_done(folder) >= 5, 90, "a checkpoint", lambda: site.log("unwanted"))
    assert main.main(["jobs", "status", str(folder)]) == 0
    assert "running" in capsys.readouterr().out
    assert main.main(["jobs", "cancel", str(folder)]) == 0
    wait_for(lambda: slurm.job_state(site.handles["unwanted"]) == "CANCELLED", 30, "the cancelled state")
    gone = [site.cluster.processes(node, f"launch.workers.rank {folder}") for node in site.cluster.nodes]
    assert not any(gone)
    assert main.main(["jobs", "status", str(folder)]) == ExitCode.FAILED
    assert "cancelled" in capsys.readouterr().out
    assert steps_done(folder) >= 5


@pytest.mark.timeout(400)
def test_a_chain_stops_at_its_first_failure(others: Site) -> None:
    site, folder = others, others.base / "broken"
    wait_for(lambda: site.state("never") == "CANCELLED", 90, "the end of the chain", lambda: site.log("broken"))
    assert site.state("broken") == "FAILED"
    assert "not tried again" in (folder / "logs" / "slurm.log").read_text()
    assert "there is no shard folder /nowhere" in (folder / "logs" / "rank_0.log").read_text()
    assert starts(site.base / "broken") == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_on_a_disconnected_node_does_not_damage_the_restarted_run(runs: Site) -> None:
    """Split brain, in two runs: the only rank of a run continues although its job was restarted elsewhere.

    One node is reconnected after its rank has ended, the other one before. The srun of the latter then cancels
    the job step of its number, which the new start uses as well: that start saves and is restarted.
    """
    for name in ("alone", "severed", "rejoined"):
        runs.submit(name, "launcher.nodes=1")
    cut = {}
    for name in ("severed", "rejoined"):
        runs.reach(name, LATE)
        cut[name] = runs.sever(name)
    runs.reach_start("rejoined", 2)
    runs.cluster.mend(cut["rejoined"][0])
    for pid in cut["rejoined"][1]:
        with contextlib.suppress(ProcessLookupError):  # SLURM may have ended it by now
            os.kill(pid, signal.SIGCONT)
    runs.continue_severed_run("severed", cut["severed"][1])
    runs.cluster.mend(cut["severed"][0])
    for name in ("alone", "severed", "rejoined"):
        runs.finish(name)
    logs = {name: runs.base / name / "logs" for name in cut}
    for name in cut:
        same_bits(runs, name, "alone")
        assert "start 0: starting again" not in (logs[name] / "slurm.log").read_text()
    assert starts(runs.base / "severed") == 2
    assert "is start number 1 of the run and number 2 exists" in (logs["severed"] / "rank_0.log").read_text()
    assert starts(runs.base / "rejoined") in (2, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_preempted_job_is_requeued_and_continues(runs: Site) -> None:
    """A job in a partition of higher priority takes one of its nodes."""
    runs.finish("calm")
    folder = runs.submit("displaced")
    runs.reach("displaced", LATE)
    node = runs.nodes("displaced")[1]
    urgent = ("--parsable", "--partition=urgent", f"--nodelist={node}", "--output=/dev/null", "--wrap=true")
    job = slurm.ask("sbatch", *urgent).strip()
    wait_for(lambda: slurm.job_state(job) == "COMPLETED", 60, "the urgent job", lambda: runs.log("displaced"))
    assert starts(folder) == 1, "the preempted run has not restarted yet"
    runs.finish("displaced")
    same_bits(runs, "displaced")
    assert starts(folder) == 2
    log = (folder / "logs" / "slurm.log").read_text()
    assert "received SIGTERM" in log
    assert "starting again after" not in log, "SLURM requeues preempted jobs itself"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_deepspeed_with_two_ranks_on_a_node_of_gpus(runs: Site) -> None:
    for name in ("zero_calm", "zero_struck"):
        runs.submit(name, *ZERO)
    runs.reach("zero_struck", LATE)
    (node,) = runs.nodes("zero_struck")
    given = {variable(pid, "CUDA_VISIBLE_DEVICES") for pid in runs.ranks("zero_struck", node)}
    assert given == {"0,1"}
    runs.kill_rank("zero_struck", node)
    for name in ("zero_calm", "zero_struck"):
        runs.finish(name)
    same_bits(runs, "zero_struck", "zero_calm")
    assert starts(runs.base / "zero_struck") == 2
    log = (runs.base / "zero_struck" / "logs" / "slurm.log").read_text()
    assert "start 0: 2 ranks on n" in log
    assert "starting again after" in log


@pytest.mark.timeout(400)
def test_hostile_names_execute_nothing(others: Site) -> None:
    wait_for(
        lambda: others.state(HOSTILE) == "FAILED",
        60,
        "the end of the job",
        lambda: others.log(HOSTILE),
    )
    assert not list(others.base.rglob("pwned"))
    log = (others.base / HOSTILE / "logs" / "rank_0.log").read_text()
    assert f"there is no shard folder {HOSTILE_SHARDS}" in log


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_missing_slurm_tools_are_a_failure_where_slurm_is_required(
    required: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CI must not pass by skipping these tests."""
    monkeypatch.setenv("AURICLE_REQUIRE_SLURM", required)
    monkeypatch.setattr(mini_slurm, "TOOLS", ("no-such-tool",))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(outcome, match="no-such-tool"):
        require_slurm()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_elastic_run_that_loses_a_node_continues_on_the_nodes_that_are_left(runs: Site) -> None:
    """Only three nodes may be used, so that two are left; they share four micro-batches like the three before."""
    others = ",".join(runs.cluster.nodes[3:])
    settings = ("data.micro_batches=4", "data.batch_seconds=16", f"launcher.exclude='{others}'", "launcher.nodes=3")
    runs.submit("fixed", *settings)
    runs.finish("fixed")
    wait_for(lambda: set(runs.cluster.nodes[:3]) <= set(runs.cluster.idle()), 60, "three free nodes")
    runs.submit("elastic", *settings, "launcher.elastic=true")
    runs.reach("elastic", EARLY)
    nodes = runs.nodes("elastic")
    assert len(nodes) == 3, runs.log("elastic")
    lost = nodes[1]
    runs.cluster.power_off(lost)
    try:
        runs.finish("elastic", 300)
    finally:
        runs.cluster.boot(lost)
    log = (runs.base / "elastic" / "logs" / "slurm.log").read_text()
    assert "start 0: 3 ranks" in log
    assert "start 1: 2 ranks" in log
    assert handed_over(runs.base / "elastic") == handed_over(runs.base / "fixed")
    losses = [[loss for _, loss, _ in learned(runs.base / name)] for name in ("elastic", "fixed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
