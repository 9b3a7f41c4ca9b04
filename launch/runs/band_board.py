"""A run's curves with the band of its recipe's seeds, as margin charts of TensorBoard's custom scalars."""

from __future__ import annotations

from pathlib import Path

from launch.runs.bands import Bands, at, curve


def write_charts(bands: Bands, run: Path, folder: Path) -> int:
    """Writes events with a run's curves and their bands to `folder`; returns the number of charts.

    Values and limits are written at the same steps, which a margin chart needs; a run that goes on is shown as it was.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer, charts = SummaryWriter(str(folder)), {}
    for name, band in bands.curves.items():
        values = curve(run, name, points=500)
        if not values:
            continue
        tags = [f"{name}", f"band_low/{name}", f"band_high/{name}"]
        for step, value in sorted(values.items()):
            _, _, low, high = at(band, step)
            for tag, number in zip(tags, (value, low, high), strict=True):
                writer.add_scalar(tag, number, step)
        charts[name] = ["Margin", tags]
    if charts:
        title = f"band of {len(bands.seeds)} seeds of {bands.recipe}"
        writer.add_custom_scalars({title: charts})
    writer.close()
    return len(charts)
