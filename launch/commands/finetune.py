"""auricle finetune: a checkpoint becomes a speech recogniser."""

from __future__ import annotations

from launch.cli import request as job


def run(arguments: list[str]) -> int:
    """Exit code 0 once trained and judged, 2 for a bad config."""
    from pretrain.adaptation.ctc_finetune import FinetuneConfig, finetune

    request = job.read("finetune", FinetuneConfig, arguments)
    if request is None:
        return 0
    from rich.table import Table

    from launch.cli.tables import show

    table = Table("decoder", "WER", "CER", "utterances", box=None, pad_edge=False)
    for found in finetune(request.config):
        table.add_row(found.decoder, f"{found.wer:.1%}", f"{found.cer:.1%}", str(found.utterances))
    show(table)
    return 0
