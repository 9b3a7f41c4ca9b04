"""The commands of `auricle`."""

from __future__ import annotations

COMMANDS = {
    "preprocess": ("preprocess", "raw audio -> shards, with Ray"),
    "targets": ("targets", "frame labels of shards, by k-means on MFCC or on a layer of a checkpoint"),
    "tokens": ("tokens", "tokens of the texts in shards: characters, byte-pair units or phones"),
    "pretrain": ("pretrain", "shards -> a pretrained checkpoint, with DeepSpeed"),
    "pipeline": ("pipeline", "preprocess, targets, pretrain and evaluate in order, here, on SLURM or on Ray"),
    "demo": ("demo", "from audio to a checkpoint in a few minutes"),
    "shards": ("shards", "inspect, verify or count the content of a shard folder"),
    "plan-run": ("plan_run", "estimate memory, time and communication of a run on a cluster"),
    "data": ("data", "the step plan of a run, and batch limits for a machine"),
    "evaluate": ("evaluate", "frozen encoders by probes, ABX, PNMI and RankMe, with baselines"),
    "device": ("device", "takes part in a federated run with the audio of this machine"),
    "finetune": ("finetune", "a checkpoint -> a speech recogniser or classifier, by all weights or few (LoRA …)"),
    "adapt": ("adapt", "a folder of a few labelled clips -> an adapted run, in seconds"),
    "serve": ("serve", "a WebSocket server of streaming recognition, with a web page for the microphone"),
    "transcribe": ("transcribe", "recordings -> text with word times, as text, JSON, subtitles or TSV"),
    "embed": ("embed", "recordings, texts and images -> vectors of one space, as Parquet or NPY"),
    "search": ("search", "recordings, texts and images near a text, a recording or an image"),
    "speak": ("speak", "text -> speech, by a checkpoint with a synthesis head"),
    "board": ("board", "TensorBoard of runs, listed by name"),
    "compare": ("compare", "compare two or more runs in a table and a plot"),
    "bands": ("bands", "a recipe with several seeds -> mean, deviation and 95 % band of its curves"),
    "runs": ("runs", "list runs with their key figures"),
    "replay": ("replay", "repeat a failed update on its saved batch"),
    "recipes": ("recipes", "size and cost of each shipped experiment, with published figures"),
    "compress": ("compress", "a run -> a smaller run with fewer blocks, heads and inner channels"),
    "export": ("export", "a run -> a Hugging Face folder, TorchScript or ONNX, verified before it is written"),
    "bench": ("bench", "speed, memory and size of exported graphs on this machine"),
    "jobs": ("jobs", "list, follow, cancel and requeue runs of any launcher"),
    "doctor": ("doctor", "check this machine; shows how to install missing packages"),
    "completion": ("completion", "print the completion script of bash or zsh"),
}
"""Command -> (module in launch.commands, one line of help)."""

SUBCOMMANDS = {
    "shards": {
        "stats": "hours by corpus and language, lengths, rejected segments by reason",
        "inspect": "the first samples, or those with a given text in their key",
        "verify": "reads every byte and compares checksums",
        "index": "indexes existing WebDataset tars without changing them",
    },
    "jobs": {
        "list": "all runs below a folder",
        "status": "state and progress of a run",
        "logs": "output of its ranks",
        "cancel": "end a run",
        "requeue": "restart a run; it continues from its newest checkpoint",
    },
    "data": {
        "plan": "the plan of one epoch: steps, hours, padding, shapes, memory",
        "find-caps": "the largest micro-batches that fit on this device [--memory=GB]",
    },
    "completion": {"bash": "the script for bash", "zsh": "the script for zsh"},
}
"""Command -> its subcommands, or the values of its only argument -> one line of help."""

FIRST_WORDS = {
    "preprocess": "reading the config, then listing the corpus",
    "targets": "reading the config and the shards",
    "tokens": "reading the config and the texts of the shards",
    "pretrain": "reading the config, then checking shards and checkpoint",
    "pipeline": "reading the config and the inputs of every step",
    "demo": "preparing speech, shards and a run",
    "shards": "reading the records of the shards",
    "plan-run": "running the model's forward pass on this CPU",
    "data": "reading the indexes and planning an epoch",
    "evaluate": "reading the config, manifest and checkpoints",
    "finetune": "reading the config, manifest and checkpoint",
    "device": "reading the config, then connecting to the server",
    "adapt": "reading the clips and the checkpoint",
    "serve": "loading the recogniser",
    "transcribe": "loading the recogniser",
    "embed": "loading the run",
    "search": "loading the run and the index",
    "speak": "loading the voice",
    "board": "looking for runs",
    "compare": "reading the metrics of the runs",
    "bands": "reading the config, then starting or reading a run for each seed",
    "runs": "reading the run folders and asking SLURM or Ray about queued ones",
    "replay": "loading the run and its saved batch",
    "recipes": "building the model of each experiment",
    "compress": "loading the run, then cutting and comparing it",
    "export": "loading the run, then converting and comparing it",
    "bench": "loading the graphs, then timing them",
    "jobs": "reading the run folders and asking SLURM or Ray about queued ones",
    "doctor": "looking at this machine",
}
"""Command that may take seconds to start -> what it prints on stderr at once."""

CONTINUE = {
    "preprocess": "finished shards stay; the same command continues with the remaining ones",
    "targets": "the labels of finished shards stay; the same command continues with the remaining ones",
    "tokens": "nothing is written before the end; the same command starts over",
    "pretrain": "the same command continues from the newest checkpoint",
    "pipeline": "finished steps stay; the same command continues with the remaining ones",
    "demo": "finished steps stay; the same command continues from them",
    "shards": "nothing was changed but indexes, which stay; the same command starts over",
    "evaluate": "no result is written before the end; the same command starts over",
    "finetune": "data and checkpoints stay; the same command continues from the newest checkpoint",
    "device": "the same command takes part again from the next round on",
    "adapt": "data and checkpoints stay; the same command continues from the newest checkpoint",
    "speak": "files that were written stay; the same command starts over",
    "transcribe": "texts that were written stay; the same command starts over",
    "compress": "nothing is written before the comparison; the same command starts over",
    "export": "nothing is written before the comparison; the same command starts over",
    "bands": "finished runs stay; the same command continues with the remaining ones",
    "embed": "the same command starts over",
    "bench": "the same command starts over",
}
"""Command -> what Ctrl-C leaves, and how to continue; other commands only show something and are given again."""
