"""A pytest plugin: the fixture `parity(quantity, tolerance, error)`, and the table of all that it compared.

The fixture asserts, and adds a row to the table that pytest prints at its end. The table is a by-product of the tests,
so this file is a plugin of pytest (see tests/conftest.py) and not a program of benchmarks/.

`--parity-table FILE` runs only the tests that use it, slow ones included, and writes the table to FILE. Where only some
test files are given, rows of other files are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

Parity = Callable[[str, float, float], None]
PEERS = ("torch", "torchaudio", "torchmetrics", "transformers", "scikit-learn", "numpy")
HEADER = """# Parity

Comparisons with an independent implementation, or of two ways through auricle: tolerance, and the largest error of all
cases. `make parity-table` writes this file; `make test` checks the same rows, except those of slow tests.
"""


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Returns the check of one quantity, which fails above the tolerance."""

    def check(quantity: str, tolerance: float, error: float) -> None:
        request.node.user_properties.append(("parity", (quantity, tolerance, float(error))))
        assert error <= tolerance, f"{quantity}: error {error:.2e} is above {tolerance:.0e}"

    return check


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest |found − expected| / (1 + |expected|): absolute for small, relative for large numbers."""
    assert found.shape == expected.shape
    return float(((found - expected).abs() / (1 + expected.abs())).detach().max())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", type=Path, metavar="FILE", help="run parity tests alone; write their table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--parity-table"):
        config.hook.pytest_deselected(items=[item for item in items if not compares(item)])
        items[:] = [item for item in items if compares(item)]


def compares(item: pytest.Item) -> bool:
    return "parity" in getattr(item, "fixturenames", ())


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    worst, cases, files = rows(terminalreporter.getreports("passed") + terminalreporter.getreports("failed"))
    if not worst:
        return
    terminalreporter.section("parity")
    for (quantity, tolerance), error in sorted(worst.items()):
        terminalreporter.write_line(f"{quantity:<80} tolerance {tolerance:.0e}   largest error {error:.1e}")
    target = config.getoption("--parity-table")
    if target is None:
        return
    if exitstatus != 0 or terminalreporter.getreports("skipped"):
        terminalreporter.write_line(f"{target} was not changed, since a test failed or was skipped")
        return
    table = {
        f"| {key[0]} | {show(key[1])} | {show(error)} | {cases[key]} | {', '.join(sorted(files[key]))} |": min(
            files[key]
        )
        for key, error in worst.items()
    }
    table |= kept(target, set().union(*files.values()))
    lines = [HEADER, f"With {', '.join(f'{peer} {version(peer)}' for peer in PEERS)}.\n"]
    lines += ["| quantity | tolerance | largest error | cases | test |", "|---|---|---|---|---|"]
    lines += sorted(table, key=lambda row: (table[row], row))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"wrote {target}")


def kept(table: Path, run: set[str]) -> dict[str, str]:
    """Returns the rows of a table whose test files were not run now, with their first file."""
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    files = {line: line.split("|")[-2].strip().split(", ") for line in lines if "`tests/" in line}
    return {line: min(names) for line, names in files.items() if not run & set(names)}


def rows(reports: list[Any]) -> tuple[dict[Any, float], dict[Any, int], dict[Any, set[str]]]:
    """Returns, by (quantity, tolerance), the largest error, the number of tests, and their files.

    Read from the tests' reports, which come from all workers of pytest-xdist.
    """
    worst: dict[Any, float] = {}
    cases: dict[Any, int] = {}
    files: dict[Any, set[str]] = {}
    for report in reports:
        seen = [value for name, value in report.user_properties if name == "parity"] if report.when == "call" else []
        for quantity, tolerance, error in seen:
            worst[quantity, tolerance] = max(worst.get((quantity, tolerance), 0.0), error)
            files.setdefault((quantity, tolerance), set()).add(f"`{report.nodeid.partition('::')[0]}`")
        for key in {(quantity, tolerance) for quantity, tolerance, _ in seen}:
            cases[key] = cases.get(key, 0) + 1
    return worst, cases, files


def show(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
