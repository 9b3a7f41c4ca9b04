"""tests/unit mirrors the packages: folders have the names of packages, and hold the tests of their modules."""

from __future__ import annotations

from pathlib import Path

from tests.support.paths import ROOT

UNIT = ROOT / "tests" / "unit"
PACKAGES = ("auricle", "data_pipeline", "pretrain", "launch", "benchmarks")
TESTS = sorted(path.relative_to(UNIT) for path in UNIT.rglob("test_*.py") if path.parent != UNIT)
MODULES = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
NAMES = {module.stem for module in MODULES}


def test_folders_of_tests_are_packages() -> None:
    assert {str(test.parent) for test in TESTS if not (ROOT / test.parent).is_dir()} == set()


def test_a_test_with_the_name_of_a_module_is_beside_it() -> None:
    """A test may also have the name of a package, or of a topic that no module has."""

    def is_beside(test: Path, name: str) -> bool:
        return test.parent / f"{name}.py" in MODULES or (ROOT / test.parent / name).is_dir()

    names = {test: test.stem.removeprefix("test_") for test in TESTS}
    assert [str(test) for test, name in names.items() if name in NAMES and not is_beside(test, name)] == []
