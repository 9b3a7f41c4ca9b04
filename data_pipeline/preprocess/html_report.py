"""Builds the HTML report of a data set: hours in and out, reasons, histograms, speakers, examples, failures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.audio.codecs import encode, to_int16
from data_pipeline.audio.samples import open_sample
from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.storage import FileStore
from data_pipeline.core.text import html_text
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.records import Reject
from data_pipeline.preprocess.ledger import Ledger
from data_pipeline.shards.records import DoneRecord, read_index
from data_pipeline.shards.statistics import SegmentAmount, SegmentStatistics, statistics_of

GALLERY = 8
LONGEST = 12
"""Speakers in the table."""
LISTED = 500
"""Number of rows of the list of rejected files on the page; the file has all."""
CLIP_SECONDS = 5
GALLERY_LEGEND = (
    f"Spectrograms: time to the right, at most {CLIP_SECONDS} s; frequency upwards, 0 to 8 kHz; lighter is louder, "
    "over 70 dB."
)
STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5d6b7a;--line:#d8dee6;--bar:#2f6fb2;--back:#fff;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#9aa7b5;--line:#36414d;--bar:#6aa9e9;--back:#14191f;
--card:#1c232b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1080px;margin:2rem auto;
padding:0 1rem}h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p{color:var(--soft);margin:.2rem 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.8rem;margin:1.2rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem}
.card b{display:block;font-size:1.35rem}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));
gap:1rem}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem}th,td{text-align:left;
padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums;white-space:nowrap}td.k,th.k{white-space:nowrap}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}
tr.sum td{font-weight:600}svg line{stroke:var(--ink);stroke-width:1}
svg rect{fill:var(--bar)}figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.6rem}figure img{width:100%;height:110px;image-rendering:auto}figcaption{font-size:.8rem;color:var(--soft);
overflow-wrap:anywhere}audio{width:100%;height:32px}
"""


@dataclass(frozen=True)
class Page:
    """The content of a report."""

    title: str
    sets: Sequence[tuple[str, Sequence[DoneRecord]]]
    """(root, finished units) of each folder."""
    ledger: Ledger
    duplicates: Sequence[Mapping[str, object]]
    """Rows of duplicates.jsonl."""
    facts: Sequence[tuple[str, str]]
    """Rows of the table in the terminal."""


def build_report(page: Page) -> str:
    """Returns the report as self-contained HTML."""
    records = [record for _, found in page.sets for record in found]
    found = statistics_of(page.sets)
    quarantine, title = page.ledger.quarantine, html_text(page.title)
    body = [
        f"<h1>{title}</h1><p>report of preprocessing</p>",
        _cards(found, records, page.ledger),
        "<h2>Corpora</h2>" + _corpora(found),
        "<h2>Hours in and out</h2>" + FLOW_LEGEND + _flow(page.ledger),
        "<h2>Segments</h2><p>Height: number of segments. The line marks the median.</p><div class=charts>",
        _histogram("duration", "s", found.values("n_samples") / SAMPLE_RATE),
        _histogram("signal-to-noise ratio (estimate)", "dB", found.values("snr_db")),
        _histogram("level", "dB of full scale", found.values("level_dbfs")),
        "</div><h2>Speakers</h2>" + _speakers(found),
        f"<h2>Examples</h2><p>{GALLERY_LEGEND}</p><div class=charts>" + "".join(_gallery(page.sets)) + "</div>",
        _duplicates(page.duplicates),
        f"<h2>Rejected files ({len(quarantine):,})</h2>" + _quarantine(quarantine),
        "<h2>This job</h2>" + _table(("", ""), page.facts, numbers=()),
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _hours(amount: SegmentAmount) -> float:
    return amount.samples / SAMPLE_RATE / 3600


def _all(found: SegmentStatistics) -> SegmentAmount:
    return found.total().get((), SegmentAmount())


def _unnamed(found: SegmentStatistics) -> SegmentAmount:
    """Returns the segments whose corpus names no speaker."""
    return found.total("name").get(("",), SegmentAmount())


def _cards(found: SegmentStatistics, records: Sequence[DoneRecord], ledger: Ledger) -> str:
    recordings, read = ledger.total("in")
    unnamed = _unnamed(found)
    facts = [
        (f"{read / SAMPLE_RATE / 3600:,.2f} h", "in"),
        (f"{_hours(_all(found)):,.2f} h", "out"),
        (f"{_all(found).segments:,}", "segments"),
        (f"{recordings:,}", "recordings"),
        (f"{found.named().get((), 0):,}", "speakers"),
        *([(f"{_hours(unnamed):,.2f} h", "of unknown speakers")] if unnamed.segments else []),
        (f"{sum(1 for record in records if record.shard):,}", "shards"),
    ]
    return "<div class=cards>" + "".join(f"<div class=card><b>{b}</b>{t}</div>" for b, t in facts) + "</div>"


def _corpora(found: SegmentStatistics) -> str:
    everything, speakers = _all(found), found.named("corpus", "language")
    total = max(_hours(everything), 1e-12)
    rows = [
        (corpus, language or "–", f"{speakers[corpus, language]:,}", f"{amount.segments:,}",
         f"{_hours(amount):,.3f}", f"{_hours(amount) / total:.1%}")
        for (corpus, language), amount in sorted(
            found.total("corpus", "language").items(), key=lambda item: -item[1].samples
        )
    ]  # fmt: skip
    rows.append(
        ("all", "", f"{found.named().get((), 0):,}", f"{everything.segments:,}", f"{_hours(everything):,.3f}", "100.0%")
    )
    head = ("corpus", "language", "speakers", "segments", "hours", "share")
    return _table(head, rows, numbers=(2, 3, 4, 5), bold=-1)


FLOW_LEGEND = (
    "<p>in: recordings as they came; out: segments in the shards; every other row is what a stage rejected, with its "
    "reason. Hours in and those of recordings in several segments are hours out and rejected ones. Rows without hours "
    "are recordings of unknown length.</p>"
)


def _flow(ledger: Ledger) -> str:
    order = {"in": 0, "discover": 1, "dedup": 2, "decode": 3, "vad": 4, "cut": 5, "filter": 6, "text": 8, "out": 9}
    keys = [key for key in ledger.counts if key[2] != "recording"]
    keys.sort(key=lambda key: (key[0], key[1], order.get(key[2], 7), key[3]))

    def hours(samples: int) -> str:
        return f"{samples / SAMPLE_RATE / 3600:,.3f}"

    rows = [
        (key[0], key[1] or "–", key[2], key[3] or "–", f"{ledger.counts[key]:,}", hours(ledger.samples[key]))
        for key in keys
    ]
    for stage in ("in", "out"):
        count, samples = ledger.total(stage)
        rows.append(("all", "", stage, "–", f"{count:,}", hours(samples)))
    head = ("corpus", "language", "stage", "reason", "recordings or segments", "hours")
    return _table(head, rows, numbers=(4, 5), bold=-2)


def _histogram(title: str, unit: str, values: npt.NDArray[Any]) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    counts, edges = np.histogram(values, bins=30)
    width, height, tallest = 300, 120, max(int(counts.max()), 1)
    bars = "".join(
        f"<rect x='{10 + i * width / 30:.1f}' y='{height - 100 * c / tallest:.1f}' width='{width / 30 - 1:.1f}' "
        f"height='{100 * c / tallest:.1f}'><title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {c:,}</title></rect>"
        for i, c in enumerate(counts)
    )
    low, middle, high = (
        np.format_float_positional(v, 3, fractional=False, trim="-") for v in (edges[0], np.median(values), edges[-1])
    )
    place = 10 + width * float((np.median(values) - edges[0]) / (edges[-1] - edges[0]))
    name = html_text(f"{title}, {unit}")
    return (
        f"<figure><figcaption>{name} · median {middle} {html_text(unit)} · {len(values):,} segments</figcaption>"
        f"<svg viewBox='0 0 320 150' role=img aria-label='{name}'>{bars}"
        f"<line x1='{place:.1f}' x2='{place:.1f}' y1='16' y2='120'/><text x='10' y='12'>{tallest:,} segments</text>"
        f"<text x='10' y='135'>{low}</text><text x='310' y='135' text-anchor='end'>{high}</text>"
        f"<text x='160' y='147' text-anchor='middle'>{name}</text></svg></figure>"
    )


def _speakers(found: SegmentStatistics) -> str:
    named = [(key, amount) for key, amount in found.total("corpus", "name").items() if key[1]]
    ordered = sorted(named, key=lambda item: -item[1].samples)
    shown, others = ordered[:LONGEST], SegmentAmount()
    rows = [(*key, f"{amount.segments:,}", f"{_hours(amount):,.3f}") for key, amount in shown]
    for _, amount in ordered[LONGEST:]:
        others.add(amount)
    for text, amount in (
        (f"{len(named) - len(shown):,} other speakers", others),
        ("no speaker named", _unnamed(found)),
    ):
        if amount.segments:
            rows.append(("", text, f"{amount.segments:,}", f"{_hours(amount):,.3f}"))
    rows.append(("all", "", f"{_all(found).segments:,}", f"{_hours(_all(found)):,.3f}"))
    more = f"<p>{len(named):,} speakers; the {len(shown)} with the most hours</p>" if named else ""
    return more + _table(("corpus", "speaker", "segments", "hours"), rows, numbers=(2, 3), bold=-1)


def _gallery(sets: Sequence[tuple[str, Sequence[DoneRecord]]]) -> Iterable[str]:
    """Yields some segments, always the same for a data set, with spectrogram and audio."""
    units = [(root, record) for root, found in sets for record in found if record.shard]
    units.sort(key=lambda unit: keyed_seed(unit[1].unit, "gallery"))
    for number in range(min(GALLERY, sum(record.segments for _, record in units))):
        root, record = units[number % len(units)]
        rows = read_index(root, record).to_pylist()
        row = rows[keyed_seed(record.unit, number, "segment") % len(rows)]
        store = FileStore(root)
        start, end = row["payload_offset"], row["payload_offset"] + row["payload_size"]
        content = store.fs.cat_file(store.path(record.shard), start=start, end=end)
        with open_sample(content) as sample:
            clip = sample.read(count=CLIP_SECONDS * SAMPLE_RATE)
        sound = base64.b64encode(encode(to_int16(clip), SAMPLE_RATE, "flac")).decode()
        image = base64.b64encode(_png(_spectrogram(clip))).decode()
        what = f"{row['corpus']} · {row['speaker'] or 'unknown speaker'} · {row['n_samples'] / SAMPLE_RATE:.1f} s"
        yield (
            f"<figure><img alt='spectrogram, 0 to 8 kHz' src='data:image/png;base64,{image}'>"
            f"<audio controls preload=none src='data:audio/flac;base64,{sound}'></audio>"
            f"<figcaption>{html_text(what)}<br>{html_text(row['key'])}</figcaption></figure>"
        )


def _duplicates(rows: Sequence[Mapping[str, object]]) -> str:
    if not rows:
        return ""
    shown = [
        (
            str(row["file_id"]),
            str(row["same_as"]),
            str(row["reason"]),
            f"{100 * float(str(row['share'])):.0f} %",
            f"{float(str(row['offset_seconds'])):+.1f} s",
        )
        for row in rows[:LISTED]
    ]
    more = f"<p>the first {LISTED:,}; duplicates.jsonl has all</p>" if len(rows) > LISTED else ""
    head = ("rejected", "same as", "kind", "shared", "begins at")
    return f"<h2>Duplicates ({len(rows):,})</h2>{more}" + _table(head, shown, numbers=(3, 4), whole=(2,))


def _quarantine(rejects: Sequence[Reject]) -> str:
    if not rejects:
        return "<p>every recording gave at least one segment</p>"
    rows = [(reject.path or reject.file_id, reject.stage, reject.reason, reject.error) for reject in rejects[:LISTED]]
    more = f"<p>the first {LISTED:,}; quarantine.jsonl has all</p>" if len(rejects) > LISTED else ""
    return more + _table(("file", "stage", "reason", "error"), rows, numbers=(), whole=(1, 2))


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Sequence[int],
    whole: Sequence[int] = (),
    bold: int = 0,
) -> str:
    """Returns a table. numbers: columns of figures; whole: columns without line breaks; bold: -n: the last n rows."""

    def cell(tag: str, column: int, text: str) -> str:
        kind = " class=n" if column in numbers else " class=k" if column in whole else ""
        return f"<{tag}{kind}>{html_text(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, text) for i, text in enumerate(head)) + "</tr>"] if any(head) else []
    listed = list(rows)
    for number, row in enumerate(listed):
        kind = " class=sum" if number >= len(listed) + bold else ""
        lines.append(f"<tr{kind}>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>")
    return "<div class=scroll><table>" + "".join(lines) + "</table></div>"


def _spectrogram(wave: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Returns a spectrogram as (128, frames) grey values over 70 dB, low frequencies at the bottom."""
    padded = np.pad(wave, (0, max(0, 512 - len(wave))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 512)[::160] * np.hanning(512)
    power = np.abs(np.fft.rfft(frames, axis=1))[:, :256].reshape(len(frames), 128, 2).sum(axis=2) ** 2
    decibel = 10 * np.log10(power + 1e-10)
    scaled = np.clip((decibel - decibel.max() + 70) / 70, 0, 1)
    grey: npt.NDArray[np.uint8] = (255 * scaled.T[::-1]).astype(np.uint8)
    return grey


def _png(grey: npt.NDArray[np.uint8]) -> bytes:
    """Returns an 8-bit greyscale PNG."""
    target = io.BytesIO()
    Image.fromarray(grey).save(target, "PNG", optimize=True)
    return target.getvalue()
