"""Descriptions of the tags in TensorBoard: the text behind the (i) of a card."""

from __future__ import annotations

DESCRIPTIONS = {
    "loss/total": "Loss that is minimised, per target of the update, heads and regularisers included.",
    "loss/": "A part of the loss, per target of the update, before its weight.",
    "valid/loss/": "The same loss of held-out audio (data.valid), with the same masks at every measurement.",
    "valid/": "The same measure of held-out audio (data.valid).",
    "metric/accuracy": "Share of masked frames whose target is predicted, from 0 to 1.",
    "metric/perplexity": "exp(entropy) of code use in the update: how many codes are used as if equally often.",
    "metric/soft_perplexity": "The same of the quantiser's probabilities before a code is chosen.",
    "metric/code_usage": "Share of the codes that occurred in the update, from 0 to 1.",
    "metric/masked_share": "Share of the frames that were masked, from 0 to 1.",
    "metric/chance_loss": "Loss of a uniform guess among each target's own candidates.",
    "metric/chance_accuracy": "Accuracy of that guess.",
    "evaluate/": "Result of auricle evaluate follow=true on a checkpoint of this run; larger is better unless the name "
    "says error.",
    "health/std": "Standard deviation over frames of a stage's output, mean over channels; near 0 after a collapse.",
    "health/rank/": "RankMe (arXiv 2210.02885): effective number of dimensions of a layer's frames.",
    "health/target_std": "Standard deviation of the target vectors over frames.",
    "health/prediction_std": "Standard deviation of the predicted vectors over frames.",
    "health/alarms": "Alarms of the health detectors since this start; RUN/health.jsonl has their text.",
    "health/skipped": "Updates left out as outliers since the last row.",
    "balance/share/": "Share of a task in the gradient at the encoder's output, weight and factor included.",
    "balance/factor/": "Factor of a task's loss, beside its weight (balance.name).",
    "data/usable_segments/": "Segments of the update that a head learns from.",
    "opt/lr": "Learning rate of the update.",
    "opt/grad_norm": "Global gradient norm before clipping.",
    "perf/audio_seconds_per_second": "Seconds of audio trained on per second, over all ranks (× real time).",
    "perf/step_seconds": "Seconds from update to update.",
    "perf/data_wait": "Share of the step that ranks wait for data, from 0 to 1.",
    "perf/mfu": "Model FLOP utilisation: floating-point operations of the model over the devices' peak.",
    "perf/memory_gib": "Peak memory of rank 0 in GiB: of its GPU, or of the process.",
    "data/audio_seconds": "Unpadded seconds of audio in the update, over all ranks.",
    "data/audio_hours": "Hours of audio seen since the first update.",
    "data/padding_share": "Share of the computed samples that is padding, from 0 to 1.",
    "data/epoch": "Passes over the plan that are finished.",
    "data/skipped_segments": "Segments left out because their shard is bad.",
    "data/silent_segments": "Segments of the update that are silent or constant.",
    "federated/devices": "Devices whose answers are in the update.",
    "federated/asked": "Devices that were asked in the round, over all its attempts and exchanges.",
    "federated/left_out": "Answers that are missing or were refused; RUN/left_out.jsonl has who and why.",
    "federated/attempts": "Draws of devices until enough answered.",
    "federated/bytes_sent": "Bytes of the requests of a round, over all devices.",
    "federated/bytes_received": "Bytes of the answers of a round.",
    "federated/round_seconds": "Seconds from the draw to the last answer of a round.",
    "federated/epsilon": "ε that all rounds so far have spent at engine.federated.delta; stays below the budget.",
    "meta/support_loss_before": "Loss of the inner task on the support of an episode, before its inner steps.",
    "meta/support_loss_after": "The same after the inner steps; falls below the curve before them where they adapt.",
    "meta/query_loss_before": "Loss of the outer task on the queries, with weights that are not adapted.",
    "meta/query_loss_after": "Loss of the outer task on the queries, with the adapted weights: what an update lowers.",
    "meta/inner_rate": "Mean learning rate of the inner steps, over weights and steps.",
    "hist/codes": "How often each code occurred in the update; neighbouring codes share a bar where there are many.",
    "audio/heard": "The first utterance of the micro-batch, as the model receives it.",
    "audio/masked_parts_silent": "The same with its masked frames silenced.",
    "media/": "What a head made of one utterance, beside its targets: of held-out audio (data.valid) after each "
    "measurement, else of a training batch.",
    "units/spectrogram": "Log-mel of that utterance; masked frames are lighter, and the rows below have their target "
    "and predicted units, one colour per unit.",
    "frames/": "Frames of the last layer on their first two principal axes, coloured by a label.",
}
"""By tag, or by the beginning of tags; the longest match counts."""
OF_HEADS = {
    "/accuracy": "Share of a head's targets that it predicts, from 0 to 1.",
    "/infeasible": "Share of the labelled segments that a head cannot use, such as texts longer than the frames.",
    "/foreign_symbols": "Share of the characters of the texts that are not among a head's symbols.",
    "/unknown_classes": "Share of the labelled segments whose label is not among a head's classes.",
}
"""By the end of the tags metric/HEAD/…"""


def description(tag: str) -> str:
    """Returns the meaning of a tag; "" where none is known."""
    found = [start for start in DESCRIPTIONS if tag.startswith(start)]
    if found:
        return DESCRIPTIONS[max(found, key=len)]
    return next((text for end, text in OF_HEADS.items() if tag.startswith("metric/") and tag.endswith(end)), "")
