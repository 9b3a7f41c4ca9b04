"""auricle doctor: checks this machine and prints the findings of launch.diagnostics."""

from __future__ import annotations

from pathlib import Path

from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

MARKS = {"ok": ("ok", "green"), "missing": ("–", "yellow"), "broken": ("broken", "red")}


def run(arguments: list[str]) -> int:
    """Prints the table; returns 0 if all requirements are met, 1 otherwise."""
    parser = Parser("auricle doctor", description="checks this machine; shows how to install missing packages")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder where runs would go (default: runs)")
    folder: Path = parser.parse_args(arguments).runs

    from launch.cli.tables import cell, show, table
    from launch.diagnostics import diagnose

    rows, lacking = [], []
    for finding in diagnose(folder):
        remedy = "" if finding.verdict == "ok" else finding.remedy
        needed = finding.needed and finding.verdict != "ok"
        mark = cell("needed", "red") if needed else cell(*MARKS[finding.verdict])
        rows.append((mark, finding.topic, finding.found, remedy))
        lacking += [finding.topic] if needed else []
    show(table(("", "", "found", "how to get it"), rows, fold=True))
    if lacking:
        print(f"not ready: {', '.join(lacking)}")
        return ExitCode.FAILED
    print("all requirements are met")
    return ExitCode.DONE
