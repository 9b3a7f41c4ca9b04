"""The `auricle` command: finds the verb, runs it, and turns errors into one paragraph and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from launch.exit_codes import ExitCode

VERBS = {
    "preprocess": ("preprocess", "raw audio -> shards, with Ray"),
    "targets": ("targets", "frame labels over shards, by k-means on MFCC or on a layer of a checkpoint"),
    "pretrain": ("pretrain", "shards -> a pretrained checkpoint, with DeepSpeed"),
    "pipeline": ("pipeline", "preprocess, targets, pretrain and evaluate as one chain, here, on SLURM or on Ray"),
    "demo": ("demo", "the whole way in a few minutes, on speech it finds itself"),
    "shards": ("shards", "inspect, verify or count what a shard folder holds"),
    "plan-run": ("plan_run", "memory, time and communication of a run on a cluster, on paper"),
    "data": ("data", "the step plan of a run, and limits for a machine"),
    "evaluate": ("evaluate", "what frozen encoders know: probes, ABX, PNMI, RankMe, baselines beside"),
    "finetune": ("finetune", "a checkpoint -> a speech recogniser (CTC), with its word and character error rates"),
    "board": ("board", "TensorBoard on the runs, by their names"),
    "compare": ("compare", "two runs against each other, printed and plotted"),
    "runs": ("runs", "all runs with their key figures, from their folders"),
    "replay": ("replay", "the batch of an update that went wrong, run again"),
    "recipes": ("recipes", "what each shipped experiment amounts to, beside published figures"),
    "export": ("export", "a run -> a Hugging Face model folder, checked before it is written"),
    "jobs": ("jobs", "list, watch, cancel and restart runs, wherever they were sent"),
    "doctor": ("doctor", "what this machine has, what is missing and how to get it"),
}
"""Verb -> (module in launch.commands, one line of help)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: that of this process) and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return ExitCode.DONE if given else ExitCode.USAGE
    if given[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"auricle {version('auricle')}")
        return ExitCode.DONE
    if given[0] not in VERBS:
        from data_pipeline.core.schema import suggest

        near = suggest(given[0], VERBS)
        hint = f"did you mean `auricle {near}`? " if near else ""
        return _fail(f"there is no verb {given[0]!r}; {hint}there are: {', '.join(VERBS)}", ExitCode.USAGE)
    return _guarded(given[0], given[1:])


def _guarded(verb: str, arguments: list[str]) -> int:
    """Runs a verb. With AURICLE_DEBUG=1 exceptions pass through with their traceback."""
    debug = os.environ.get("AURICLE_DEBUG", "0") not in ("", "0")
    try:
        module = importlib.import_module(f"launch.commands.{VERBS[verb][0]}")
        code: int = module.run(arguments)
        return code
    except KeyboardInterrupt:
        return _fail("stopped", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except Exception as error:
        if debug:
            raise
        from data_pipeline.core.schema import ConfigError

        if isinstance(error, ConfigError):
            return _fail(f"auricle {verb}: {error}", ExitCode.USAGE)
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        return _fail(f"auricle {verb}: {kind}{error}\n(AURICLE_DEBUG=1 shows where)", ExitCode.FAILED)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    return code


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join(
        [
            "auricle: raw speech -> shards -> a self-supervised checkpoint",
            "",
            "usage: auricle VERB [field=value | group=choice] ...",
            "",
            *lines,
            "",
            "`auricle VERB --help` lists every field of that verb with its meaning, default and limits;",
            "`auricle VERB ... --cfg` prints the composed config and does nothing else.",
            "Exit codes: 0 done, 1 the work failed, 2 the command or config is wrong, 3 the run is unhealthy,",
            "4 a newer start of the run took over, 130 stopped with Ctrl-C.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
