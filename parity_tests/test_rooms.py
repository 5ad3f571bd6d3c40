"""The order of the rooms, and what the registry takes up by itself."""

import ast
from pathlib import Path

import pytest

import parity_tests
from parity_tests.registry import CASES, OPTIMIZERS, members

ROOT = Path(parity_tests.__file__).parent
ROOMS = (
    "reference",
    "registry",
    "runners",
    "compare",
    "cli",
)  # none imports a later one
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever the import stands in it."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            modules += [f"{node.module}.{name.name}" for name in node.names]
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == "parity_tests" and len(part) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported(path) <= set(ROOMS[: ROOMS.index(room) + 1])


def test_every_file_of_the_members_is_an_optimizer_with_cases() -> None:
    files = {path.stem for path in Path(members.__path__[0]).glob("[!_]*.py")}
    assert files == set(OPTIMIZERS)
    assert files == {case.optimizer.name for case in CASES}
    for case in CASES:
        assert case.name.startswith(f"{case.optimizer.name}/")
        assert OPTIMIZERS[case.optimizer.name] is case.optimizer


def test_nothing_but_tests_and_the_command_lies_beside_the_rooms() -> None:
    beside = {path.name for path in ROOT.glob("*.py") if path.name[:5] != "test_"}
    assert beside == {"__init__.py", "__main__.py"}
