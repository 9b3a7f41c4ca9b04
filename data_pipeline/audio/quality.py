"""Level, signal-to-noise ratio and clipping of segments, filters on them, and level normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.schema import about, config

FLOOR_DB = -120.0


@config
class FilterConfig:
    """Limits beyond which segments are left out, each with a reason in the report."""

    min_level_dbfs: Annotated[
        float | None, about("quieter segments (root mean square, dB of full scale) are `silence`; null keeps them")
    ] = -70.0
    max_clipped: Annotated[
        float | None, about("share of samples at full scale beyond which a segment is `clipped`; null keeps them", ge=0)
    ] = None
    min_snr_db: Annotated[
        float | None, about("segments below this estimated signal-to-noise ratio are `low_snr`; null keeps them")
    ] = None


@dataclass(frozen=True)
class Measures:
    """level_dbfs: root mean square against full scale. snr_db: see `snr`. clipped: share of samples at full scale."""

    level_dbfs: float
    snr_db: float
    clipped: float


def measure_quality(wave: Wave, rate: int) -> Measures:
    """Returns the measures of one segment.

    Args:
        wave: (T,) samples in [-1, 1].
        rate: Hz.
    """
    frame = rate // 50
    whole = len(wave) // frame * frame
    rows = wave[:whole].reshape(-1, frame)
    power = np.einsum("ij,ij->i", rows, rows) / frame
    total = float(np.dot(wave, wave)) / max(len(wave), 1)
    clipped = 0.0
    if len(wave) and (wave.max() >= 0.999 or wave.min() <= -0.999):
        clipped = float((np.abs(wave) >= 0.999).mean())
    return Measures(round(_decibel(total), 2), round(snr(power), 2), round(clipped, 6))


def snr(frame_power: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    """Returns the signal-to-noise ratio in dB, 0 to 100, estimated from the power of 20 ms frames, (frames,).

    The noise power is the 10th percentile, since pauses contain noise alone; the mean above the median is signal plus
    noise. A coarse estimate, for histograms and for removing segments that are mostly noise.
    """
    if len(frame_power) < 5:
        return 0.0
    ordered = np.sort(frame_power.astype(np.float64))
    noise = max(float(ordered[len(ordered) // 10]), 1e-12)
    both = float(ordered[len(ordered) // 2 :].mean())
    return float(np.clip(10 * np.log10(max(both - noise, 1e-12) / noise), 0.0, 100.0))


def reject_reason(measures: Measures, config: FilterConfig) -> str:
    """Returns the reason for which a segment is left out; "" if it is kept."""
    if config.min_level_dbfs is not None and measures.level_dbfs < config.min_level_dbfs:
        return "silence"
    if config.max_clipped is not None and measures.clipped > config.max_clipped:
        return "clipped"
    if config.min_snr_db is not None and measures.snr_db < config.min_snr_db:
        return "low_snr"
    return ""


def normalised(wave: Wave, measures: Measures, target_dbfs: float) -> tuple[Wave, float]:
    """Returns the segment at a level of `target_dbfs`, or as near as its peak allows, and the gain applied, in dB."""
    peak = float(max(wave.max(), -wave.min()))
    wanted = target_dbfs - measures.level_dbfs
    possible = 20.0 * float(np.log10(0.99 / peak)) if peak > 0 else 0.0
    gain = round(min(wanted, possible), 2)
    return wave * np.float32(10.0 ** (gain / 20.0)), gain


def _decibel(power: float) -> float:
    return max(FLOOR_DB, 10.0 * float(np.log10(power))) if power > 0 else FLOOR_DB
