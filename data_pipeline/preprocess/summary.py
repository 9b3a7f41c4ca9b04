"""Summary of a preprocessing job and forecast of its size."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.core.text import visible


@dataclass(frozen=True)
class Summary:
    """The content of a data set after a job, and what the job did. Hours are hours of audio."""

    out: str
    files: int
    """Recordings that came in: those of all finished units, duplicates, and those that discovery could not use."""
    files_used: int
    """Recordings with at least one segment, as far as the units were written by a version that counts them."""
    hours_in: float
    hours_out: float
    hours_overlapping: float
    """Hours that are in more than one segment; hours in and these are hours out and the hours of `rejects`."""
    segments: int
    shards: int
    megabytes: float
    rejects: dict[str, tuple[int, float]]
    """stage/reason: (how many recordings, segments or rows, their hours where known)."""
    quarantined: int
    """Recordings that gave nothing, and rows that name none; listed in `quarantine`."""
    quarantine: str
    report: str
    """The HTML page; "" where none was wanted."""
    imbalances: tuple[str, ...] = ()
    """Sums that do not agree; empty unless something is wrong."""
    units_done: int = 0
    """By this job."""
    units_before: int = 0
    """Finished already when it began."""
    failed_units: dict[str, str] = field(default_factory=dict)
    """Units that could not be finished, and why."""
    changed_files: int = 0
    """Recordings that changed after they were written; the shards hold them as they were."""
    seconds: float = 0.0
    """How long the job took."""
    new_hours: float = 0.0
    """Read by this job."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files below the corpus that were not taken as recordings, by ending."""
    warnings: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """One paragraph on what is not done; empty where all is done."""
        if self.failed_units:
            first, why = next(iter(self.failed_units.items()))
            return (
                f"{len(self.failed_units)} of {self.units_done + self.units_before + len(self.failed_units)} units "
                f"could not be finished (first {visible(first)}: {visible(why)}); the other units are written, and the "
                "same command tries again what is missing"
            )
        if self.imbalances:
            return f"the sums of {self.out} do not agree, which is a bug of auricle: {'; '.join(self.imbalances)}"
        if not self.segments:
            return (
                f"nothing could be used: {self.quarantined} recordings are listed in {self.quarantine}; left out as "
                f"{', '.join(self.rejects) or 'there were none'}"
            )
        return ""

    @property
    def exit_code(self) -> int:
        """0 where all work is done."""
        return 1 if self.problem else 0

    def rows(self) -> list[tuple[str, str]]:
        """For a table in the terminal."""
        overlap = self.hours_overlapping
        overlapping = f", of which {overlap:,.2f} are in more than one segment" if overlap else ""
        rows = [
            ("recordings", f"{self.files:,}"),
            ("hours in", f"{self.hours_in:,.2f}"),
            ("hours out", f"{self.hours_out:,.2f}" + overlapping),
            ("segments", f"{self.segments:,}"),
            ("shards", f"{self.shards:,} ({self.megabytes:,.1f} MB) in {self.out}"),
        ]
        rows += [
            (f"left out: {reason}", f"{count:,}" + (f" ({hours:,.2f} h)" if hours else ""))
            for reason, (count, hours) in self.rejects.items()
        ]
        if self.quarantined:
            rows.append(("quarantined files", f"{self.quarantined:,} recordings or rows, listed in {self.quarantine}"))
        rows += _skipped_rows(self.skipped, self.warnings)
        if self.changed_files:
            rows.append(("changed since", f"{self.changed_files:,} recordings; the shards hold their earlier audio"))
        if self.units_before:
            rows.append(("done before", f"{self.units_before:,} units"))
        rows.append(("report", self.report))
        speed = 3600 * self.new_hours / self.seconds if self.seconds else 0.0
        rows.append(("time", f"{self.seconds:,.1f} s, {speed:,.0f} hours of audio an hour"))
        return [(name, visible(value)) for name, value in rows]


@dataclass(frozen=True)
class Forecast:
    """Forecast of a job."""

    units: int
    units_done: int
    files: int
    hours: float
    """Expected, where the corpus does not say durations from file sizes."""
    megabytes: float
    """Expected disk need of what is still to be written."""
    free_megabytes: float | None
    """On the disk of `out`; None where that is unknown."""
    unusable: int
    """Recordings and rows known to be unusable before anything is decoded."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files below the corpus that are not taken as recordings, by ending."""
    warnings: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """For a table in the terminal."""
        free = "unknown" if self.free_megabytes is None else f"{self.free_megabytes:,.0f} MB"
        return [
            ("units", f"{self.units:,}, of which {self.units_done:,} are done"),
            ("recordings to do", f"{self.files:,}"),
            ("hours to do", f"about {self.hours:,.1f}"),
            ("disk need", f"about {self.megabytes:,.0f} MB (free: {free})"),
            ("unusable files", f"{self.unusable:,}"),
            *_skipped_rows(self.skipped, self.warnings),
        ]


def _skipped_rows(skipped: dict[str, int], warnings: tuple[str, ...]) -> list[tuple[str, str]]:
    rows = [("warning", visible(warning)) for warning in warnings]
    if skipped:
        ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{visible(ending) or 'no ending'} {count:,}" for ending, count in ordered[:12])
        rows.insert(0, ("files not taken", f"{sum(skipped.values()):,}: {shown}{' …' * (len(ordered) > 12)}"))
    return rows
