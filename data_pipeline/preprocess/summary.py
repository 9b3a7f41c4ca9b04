"""Summary of a preprocessing job and forecast of its size."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.core.text import visible


@dataclass(frozen=True)
class Summary:
    """The content of a data set after a job, and the work of the job. Hours are hours of audio."""

    out: str
    files: int
    """Input recordings: those of all finished units, duplicates, and rejects of discovery."""
    files_used: int
    """Recordings with at least one segment, in units of versions that count them."""
    hours_in: float
    hours_out: float
    hours_overlapping: float
    """Hours in more than one segment: hours_in + hours_overlapping = hours_out + the hours of `rejects`."""
    segments: int
    shards: int
    megabytes: float
    rejects: dict[str, tuple[int, float]]
    """stage/reason: (number of recordings, segments or rows; their hours, if known)."""
    quarantined: int
    """Recordings without a segment, and rows without a recording; listed in `quarantine`."""
    quarantine: str
    report: str
    """Path of the HTML report; "" without one."""
    imbalances: tuple[str, ...] = ()
    """Sums that do not agree; empty, unless there is a bug or a file was altered."""
    units_done: int = 0
    """Units that this job finished."""
    units_before: int = 0
    """Units that were finished before."""
    failed_units: dict[str, str] = field(default_factory=dict)
    """Reasons by unit that could not be finished."""
    changed_files: int = 0
    """Recordings that changed after they were written; the shards have their earlier audio."""
    relabelled: int = 0
    """Recordings with another speaker, language or text than when they were written; the shards have the earlier."""
    seconds: float = 0.0
    """Duration of the job."""
    workers: int = 0
    """Processes that this job could use at a time; 0 if it had no work."""
    busy: float = 0.0
    """Share of their time in which they processed units."""
    new_hours: float = 0.0
    """Hours of audio that this job read."""
    new_files: int = 0
    """Recordings that this job read."""
    new_segments: int = 0
    """Segments that this job wrote."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of files below the corpus that are not recordings, by ending."""
    warnings: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """Returns one paragraph on unfinished work; "" if all is done."""
        if self.failed_units:
            first, why = next(iter(self.failed_units.items()))
            return (
                f"{len(self.failed_units)} of {self.units_done + self.units_before + len(self.failed_units)} units "
                f"could not be finished (first {visible(first)}: {visible(why)}); the other units are written, and the "
                "same command retries the missing ones"
            )
        if self.imbalances:
            return f"the sums of {self.out} do not agree, which is a bug of auricle: {'; '.join(self.imbalances)}"
        if not self.segments:
            return (
                f"nothing could be used: {self.quarantined} recordings are listed in {self.quarantine}; rejected as "
                f"{', '.join(self.rejects) or 'there were none'}"
            )
        return ""

    @property
    def exit_code(self) -> int:
        """0 if all work is done."""
        return 1 if self.problem else 0

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows of a table for the terminal."""
        overlap = self.hours_overlapping
        overlapping = f", of which {overlap:,.2f} are in more than one segment" if overlap else ""
        rows = [
            ("recordings", f"{self.files:,}{self._new(f'{self.new_files:,}')}"),
            ("hours in", f"{self.hours_in:,.2f}{self._new(f'{self.new_hours:,.2f}')}"),
            ("hours out", f"{self.hours_out:,.2f}" + overlapping),
            ("segments", f"{self.segments:,}{self._new(f'{self.new_segments:,}')}"),
            ("shards", f"{self.shards:,} ({self.megabytes:,.1f} MB) in {self.out}"),
        ]
        rows += [
            (f"rejected: {reason}", f"{count:,}" + (f" ({hours:,.2f} h)" if hours else ""))
            for reason, (count, hours) in self.rejects.items()
        ]
        if self.quarantined:
            rows.append(("rejected files", f"{self.quarantined:,} recordings or rows, listed in {self.quarantine}"))
        rows += _skipped_rows(self.skipped, self.warnings)
        if self.changed_files:
            rows.append(("changed since", f"{self.changed_files:,} recordings; the shards hold their earlier audio"))
        if self.relabelled:
            kept = "the shards hold their earlier speakers, languages and texts"
            rows.append(
                ("relabelled since", f"{self.relabelled:,} recordings; {kept}; another out= takes the new ones")
            )
        if self.units_before:
            rows.append(("done before", f"{self.units_before:,} units of work; all other figures are of the whole set"))
        if self.workers:
            rows.append(("workers", f"{self.workers:,}, busy for {self.busy:.0%} of the time"))
        rows.append(("report", self.report))
        speed = 3600 * self.new_hours / self.seconds if self.seconds else 0.0
        rows.append(("time", f"{self.seconds:,.1f} s" + (f", {speed:,.0f} × real time" if speed >= 0.5 else "")))
        return [(name, visible(value)) for name, value in rows]

    def _new(self, figure: str) -> str:
        """Returns this job's part of a figure in words; "" for the first job of a data set."""
        return f", of which {figure} by this job" if self.units_before else ""


@dataclass(frozen=True)
class JobForecast:
    """Forecast of a job."""

    units: int
    units_done: int
    files: int
    hours: float
    """Expected hours, from file sizes if the corpus has no durations."""
    megabytes: float
    """Expected size of the shards to be written."""
    free_megabytes: float | None
    """Free space on the disk of `out`; None if it is unknown."""
    unusable: int
    """Recordings and rows that are known to be unusable before decoding."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of files below the corpus that are not recordings, by ending."""
    warnings: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows of a table for the terminal."""
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
