"""benchmarks/train_step.py needs no packages besides torch, torchaudio, numpy and pydantic."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from tests.support.paths import ROOT

PROGRAM = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in forbidden else self.finder.find_spec(name, path, target)

forbidden = set(sys.argv[1].split(","))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from benchmarks import train_step
for recipe in train_step.RECIPES:
    with torch.device("meta"):
        train_step.ours(recipe, "fp32", "meta")
"""


def with_requirements(names: list[str]) -> set[str]:
    """Returns the distributions and all their requirements without extras."""
    found: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            names += [re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line]
    return found


def test_every_recipe_is_built_with_these_packages_only() -> None:
    allowed = with_requirements(["torch", "torchaudio", "numpy", "pydantic"])
    own = {"data_pipeline", "pretrain", "benchmarks"}
    forbidden = [
        module
        for module, owners in packages_distributions().items()
        if module not in own and not any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)
    ]
    assert "hydra" in forbidden
    assert "transformers" in forbidden
    command = [sys.executable, "-c", PROGRAM, ",".join(forbidden)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
