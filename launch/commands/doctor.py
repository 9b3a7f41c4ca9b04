"""auricle doctor: prints what launch.diagnostics finds."""

from __future__ import annotations

from pathlib import Path

from launch.cli.parser import Parser
from launch.diagnostics import examine

MARKS = {"ok": "[green]ok[/]", "missing": "[yellow]–[/]", "broken": "[red]broken[/]"}


def run(arguments: list[str]) -> int:
    """Exit code 0 where everything needed is there."""
    parser = Parser("auricle doctor", description="what this machine has, and how to get what is missing")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder where runs would go (default: runs)")
    folder: Path = parser.parse_args(arguments).runs

    from rich.console import Console
    from rich.table import Table

    table = Table("", "", "found", "how to get it", box=None, pad_edge=False)
    lacking = []
    for finding in examine(folder):
        remedy = "" if finding.verdict == "ok" else finding.remedy
        needed = finding.needed and finding.verdict != "ok"
        table.add_row("[red]needed[/]" if needed else MARKS[finding.verdict], finding.topic, finding.found, remedy)
        lacking += [finding.topic] if needed else []
    console = Console()
    console.print(table)
    if lacking:
        console.print(f"not ready: {', '.join(lacking)}")
        return 1
    console.print("everything that is needed is there")
    return 0
