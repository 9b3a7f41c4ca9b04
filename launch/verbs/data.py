"""auricle data: the step plan that a pretraining config makes of its shards."""

from __future__ import annotations

from launch import job
from launch.config import PretrainJob

USAGE = "auricle data plan [the same overrides as for `auricle pretrain`]"


def run(arguments: list[str]) -> int:
    """Prints what one epoch looks like."""
    if arguments[:1] != ["plan"]:
        print(USAGE)
        return 0 if arguments[:1] in (["--help"], ["-h"]) else 2
    request = job.read("pretrain", PretrainJob, arguments[1:])
    if request is None:
        return 0
    from data_pipeline.plan import allowed_worlds
    from data_pipeline.stream import open_reader

    config = request.config
    reader = open_reader(config.data, config.seed, 0, 1)
    try:
        plan = reader.plan
        layout = plan.layout(0)
        used = padded = segments = 0
        steps = min(layout.steps, 200)
        for number in range(steps):
            for batch in plan.step(0, number):
                used, padded = used + batch.samples, padded + batch.padded_samples
                segments += len(batch.length_n)
        seconds = layout.samples / 16_000
        lines = {
            "plan": reader.plan_hash,
            "epoch": f"{layout.steps} steps, {seconds / 3600:.2f} h of audio, {len(plan.catalogue.shards)} shards",
            "step": f"{seconds / layout.steps:.1f} s in {segments / steps:.0f} segments, {config.data.micro_batches} "
            "micro-batches",
            "padding": f"{1 - used / padded:.2%} (first {steps} steps)",
            "epochs": f"{config.train.steps / layout.steps:.1f} in train.steps={config.train.steps}",
            "ranks": ", ".join(map(str, allowed_worlds(config.data.micro_batches))),
        }
    finally:
        reader.close()
    for name, text in lines.items():
        print(f"{name:<8} {text}")
    return 0
