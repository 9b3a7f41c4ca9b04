"""Signals between ranks: flags and counts after the sum over ranks."""

from __future__ import annotations

from pretrain.engines.signals import RankSignals


def test_summed_signals_are_flags_counts_and_waits_of_every_rank() -> None:
    ranks = [
        RankSignals(unhealthy=True, roll_back_before=7, segments=4, silent_segments=1, wait_seconds=(0.5, 0.0, 0.0)),
        RankSignals(stop_requested=True, skipped_segments=2, segments=3, wait_seconds=(0.0, 0.25, 0.0)),
        RankSignals(stop_requested=True, skipped_segments=1, segments=5, wait_seconds=(0.0, 0.0, 2.0)),
    ]
    received = RankSignals.unpacked(sum(rank.packed() for rank in ranks[1:]) + ranks[0].packed())
    assert received == RankSignals(
        stop_requested=True,
        unhealthy=True,
        roll_back_before=7,
        skipped_segments=3,
        segments=12,
        silent_segments=1,
        wait_seconds=(0.5, 0.25, 2.0),
    )
    assert received.stop_requested is True
    assert RankSignals.unpacked(RankSignals().packed()) == RankSignals()
