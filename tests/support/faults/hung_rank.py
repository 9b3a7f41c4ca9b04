"""Runs a rank that hangs in its fourth forward pass: `python -m tests.support.faults.hung_rank RUN_FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from launch.workers import rank
from pretrain.train_module import TrainModule

computed = TrainModule.forward


def forward(self: TrainModule, batch: Any, plan: Any, counts_K: Any, ctx: Any) -> Any:
    if ctx.step == 3:
        a_kernel_that_never_ends()
    return computed(self, batch, plan, counts_K, ctx)


def a_kernel_that_never_ends() -> None:
    time.sleep(600)


if __name__ == "__main__":
    TrainModule.forward = forward  # type: ignore[method-assign, assignment]
    os._exit(rank.main(sys.argv[1]))
