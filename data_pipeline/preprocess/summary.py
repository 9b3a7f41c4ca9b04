"""Summary of a preprocessing job and forecast of its size."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Summary:
    """What stands in the data set after a job, and what the job did. Hours are hours of audio."""

    out: str
    files: int
    """Recordings in all finished units."""
    hours_in: float
    hours_out: float
    segments: int
    shards: int
    megabytes: float
    rejects: dict[str, tuple[int, float]]
    """stage/reason: (how many files or segments, their hours where known)."""
    quarantined: int
    """Files that gave nothing; listed in `quarantine`."""
    quarantine: str
    report: str
    """The HTML page; "" where none was wanted."""
    units_done: int
    """By this job."""
    units_before: int
    """Finished already when it began."""
    failed_units: dict[str, str] = field(default_factory=dict)
    """Units that could not be finished, and why."""
    changed_files: int = 0
    """Recordings that changed after they were written; the shards hold them as they were."""
    seconds: float = 0.0
    hours_per_second: float = 0.0

    @property
    def problem(self) -> str:
        """One paragraph on what is not done; empty where all is."""
        if self.failed_units:
            first, why = next(iter(self.failed_units.items()))
            return (
                f"{len(self.failed_units)} of {self.units_done + self.units_before + len(self.failed_units)} units "
                f"could not be finished (first {first}: {why}); the others are written, and the same command tries "
                "again what is missing"
            )
        if not self.segments:
            return (
                f"nothing could be used: {self.quarantined} files are listed in {self.quarantine} and the segments "
                f"were left out as {', '.join(self.rejects) or 'there were none'}"
            )
        return ""

    @property
    def exit_code(self) -> int:
        """0 where all work is done."""
        return 1 if self.problem else 0

    def rows(self) -> list[tuple[str, str]]:
        """For a table in the terminal."""
        rows = [
            ("recordings", f"{self.files:,}"),
            ("hours in", f"{self.hours_in:,.2f}"),
            ("hours out", f"{self.hours_out:,.2f}"),
            ("segments", f"{self.segments:,}"),
            ("shards", f"{self.shards:,} ({self.megabytes:,.1f} MB) in {self.out}"),
        ]
        rows += [
            (f"left out: {reason}", f"{count:,}" + (f" ({hours:,.2f} h)" if hours else ""))
            for reason, (count, hours) in self.rejects.items()
        ]
        if self.quarantined:
            rows.append(("quarantined files", f"{self.quarantined:,}, listed in {self.quarantine}"))
        if self.changed_files:
            rows.append(("changed since", f"{self.changed_files:,} recordings; the shards hold them as they were"))
        if self.units_before:
            rows.append(("done before", f"{self.units_before:,} units"))
        rows.append(("report", self.report))
        rows.append(("time", f"{self.seconds:,.1f} s, {self.hours_per_second * 3600:,.0f} hours of audio an hour"))
        return rows


@dataclass(frozen=True)
class Forecast:
    """What a job would do."""

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
    """Files known to be unusable before anything is decoded."""

    def rows(self) -> list[tuple[str, str]]:
        """For a table in the terminal."""
        free = "unknown" if self.free_megabytes is None else f"{self.free_megabytes:,.0f} MB"
        return [
            ("units", f"{self.units:,}, of which {self.units_done:,} are done"),
            ("recordings to do", f"{self.files:,}"),
            ("hours to do", f"about {self.hours:,.1f}"),
            ("disk need", f"about {self.megabytes:,.0f} MB (free: {free})"),
            ("unusable files", f"{self.unusable:,}"),
        ]
