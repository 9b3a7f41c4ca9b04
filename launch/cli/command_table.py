"""The commands of `auricle`."""

from __future__ import annotations

COMMANDS = {
    "preprocess": ("preprocess", "raw audio -> shards, with Ray"),
    "targets": ("targets", "frame labels over shards, by k-means on MFCC or on a layer of a checkpoint"),
    "pretrain": ("pretrain", "shards -> a pretrained checkpoint, with DeepSpeed"),
    "pipeline": ("pipeline", "preprocess, targets, pretrain and evaluate in order, here, on SLURM or on Ray"),
    "demo": ("demo", "from audio to a checkpoint in a few minutes, on speech that it finds itself"),
    "shards": ("shards", "inspect, verify or count the content of a shard folder"),
    "plan-run": ("plan_run", "estimate memory, time and communication of a run on a cluster"),
    "data": ("data", "the step plan of a run, and batch limits for a machine"),
    "evaluate": ("evaluate", "frozen encoders by probes, ABX, PNMI and RankMe, with baselines"),
    "finetune": ("finetune", "a checkpoint -> a speech recogniser (CTC), with its word and character error rates"),
    "board": ("board", "TensorBoard on runs, by their names"),
    "compare": ("compare", "two or more runs side by side, printed and plotted"),
    "runs": ("runs", "list runs with their key figures"),
    "replay": ("replay", "run the batch of an update that went wrong again"),
    "recipes": ("recipes", "size and cost of each shipped experiment, beside published figures"),
    "export": ("export", "a run -> a Hugging Face model folder, checked before it is written"),
    "jobs": ("jobs", "list, watch, cancel and restart runs, wherever they were sent"),
    "doctor": ("doctor", "check what this machine has, and how to get what is missing"),
    "completion": ("completion", "print the completion script of bash or zsh"),
}
"""Command -> (module in launch.commands, one line of help)."""

SUBCOMMANDS = {
    "shards": {
        "stats": "hours by corpus and language, lengths, what was left out and why",
        "inspect": "the first samples, or those whose key contains a text",
        "verify": "reads every byte and compares checksums",
        "index": "indexes WebDataset tars that others wrote, without changing them",
    },
    "jobs": {
        "list": "all runs below a folder",
        "status": "state and progress of a run",
        "logs": "what its ranks printed",
        "cancel": "end it",
        "requeue": "start it again; it continues from its newest checkpoint",
    },
    "data": {
        "plan": "the plan of one epoch: steps, hours, padding, shapes, memory",
        "find-caps": "the largest micro-batches that fit on this device [--memory=GB]",
    },
    "completion": {"bash": "the script for bash", "zsh": "the script for zsh"},
}
"""Command -> its subcommands, or the values of its one argument -> one line of help."""
