"""auricle finetune: fine-tunes a checkpoint for speech recognition."""

from __future__ import annotations

from launch.cli import request
from launch.exit_codes import ExitCode


def run(arguments: list[str]) -> int:
    """Trains and evaluates; returns 0."""
    from pretrain.adaptation.ctc_finetune import FinetuneConfig, finetune

    given = request.read("finetune", FinetuneConfig, arguments)
    if given is None:
        return ExitCode.DONE
    from launch.cli.tables import show, table

    found = finetune(given.config)
    rows = [(errors.decoder, f"{errors.wer:.1%}", f"{errors.cer:.1%}", errors.utterances) for errors in found]
    show(table(("decoder", "WER", "CER", "utterances"), rows))
    return ExitCode.DONE
