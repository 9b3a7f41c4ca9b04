"""A pipeline with two HuBERT iterations on a real SLURM cluster, six jobs in a row, and a fine-tuning on two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from launch import main
from launch.launchers import slurm
from launch.runs.job_record import read_record
from pretrain.recognition.recogniser import open_recogniser
from tests.support.faults import whole_chain
from tests.support.faults.mini_slurm import require_slurm, wait_for
from tests.support.faults.site import ON_SLURM, Site, site_at
from tests.support.tones import write_tones
from tests.support.training import save


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Starts a cluster of three nodes."""
    require_slurm()
    with site_at(tmp_path_factory.mktemp("slurm"), 3) as site:
        yield site


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_pipeline_with_afterok_dependencies(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    turns = whole_chain.TWO_TURNS
    whole_chain.write(site.base)
    command = whole_chain.command(site.base, turns, *ON_SLURM, "pretrain.launcher.nodes=1")
    assert main.main(command) == 0
    names = whole_chain.names(turns)
    for name in names:
        site.handles[f"whole/runs/{name}"] = read_record(site.base / "whole" / "runs" / name).handle
    first, second = (site.handles[f"whole/runs/{name}"] for name in names[:2])
    waiting = slurm.ask("scontrol", "--oneliner", "show", "job", second)
    assert f"Dependency=afterok:{first}" in waiting or "JobState=PENDING" not in waiting
    for name in names:
        run = f"whole/runs/{name}"
        wait_for(partial(has_ended, site, run), 600, f"the end of {name}", partial(site.log, run))
        assert site.state(run) == "COMPLETED", site.log(run)
    whole_chain.require_whole(site.base, turns, command, capsys)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fine_tuning_on_two_nodes(site: Site) -> None:
    save(site.base / "tiny", 4)
    manifest = write_tones(site.base / "tones") / "manifest.tsv"
    given = [f"checkpoint={site.base / 'tiny'}", f"manifest={manifest}", f"out={site.base / 'tuned'}", "corpora=tones"]
    small = ["batch_seconds=6", "steps=6", "frozen_steps=2", "engine.name=torch", "data.micro_batches=2"]
    assert main.main(["finetune", *given, *small, *ON_SLURM]) == 0
    site.handles["tuned"] = read_record(site.base / "tuned").handle
    site.finish("tuned", 300)
    assert site.step("tuned") == 6
    assert open_recogniser(str(site.base / "tuned")).step == 6


def has_ended(site: Site, run: str) -> bool:
    return slurm.STATES.get(site.state(run), "failed") not in ("waiting", "running")
