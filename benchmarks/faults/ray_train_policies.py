"""Shows which promises Ray Train's own scaling and failure policies do not hold, so that the driver decides itself.

    python -m benchmarks.faults.ray_train_policies

No cluster is needed. launch/launchers/ray_driver.py uses Ray Train for everything else.
"""

from __future__ import annotations

import logging

from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from data_pipeline.sampling.plan import useful_worlds
from launch.exit_codes import NEVER_RETRY, ExitCode
from launch.launchers.ray_worker import RankEndedError


def main() -> None:
    """Prints one line per promise."""
    logging.disable(logging.INFO)
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}))
    three_nodes = {f"node{number}": {"CPU": 1.0} for number in range(3)}
    chosen = policy._count_possible_workers(three_nodes)
    print(
        f"ScalingConfig(num_workers=(1, 4)) on a cluster that shrank to 3 places: {chosen} workers; "
        f"of 4 micro-batches these are as slow as 2; useful are {useful_worlds(4)}"
    )
    for code in sorted(NEVER_RETRY):
        failures = DefaultFailurePolicy(FailureConfig(max_failures=3))
        decision = failures.make_decision(WorkerGroupError("", {0: RankEndedError(int(code))}))
        print(f"FailureConfig(max_failures=3) after exit code {int(code)} ({code.name}), final here: {decision.value}")
    failures = DefaultFailurePolicy(FailureConfig(max_failures=3))
    lost = WorkerGroupError("", {0: RankEndedError(int(ExitCode.FAILED))})
    decisions = [failures.make_decision(lost).value for _ in range(4)]
    print(f"… after 4 lost nodes, each after a new checkpoint, so no two failures in a row: {decisions}")


if __name__ == "__main__":
    main()
