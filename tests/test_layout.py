"""Imports point downward: a room of the package knows only the rooms below it.

The list below is the order, top to bottom. An import that points up, or a circle inside one room,
fails here with the file and the line that hold it. Imports inside functions count; those that
only type checkers read (``if TYPE_CHECKING``) do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import expunge

# A room is a module or a package directly under expunge.
ROOMS = (
    "__main__ cli console tables card report compare demo jobs cluster preloaded plan measure "
    "interference compose picking run players benches comparison folder workbench measuring "
    "editing metalearning learning probing cuts steering published recipe functions edits "
    "probes evaluation training defaults presets model objectives data miniature provenance "
    "progress processes records registry drawing masked files errors version"
).split()

PACKAGE = Path(expunge.__file__).parent


class _Imports(ast.NodeVisitor):
    """Absolute names of all that a module imports when it runs, with lines."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        for other in node.orelse:
            self.visit(other)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:  # relative: climb from the package that holds the module
            parents = self.package.split(".")[: -(node.level - 1) or None]
            base = ".".join([*parents, base]).rstrip(".")
        self.found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module under a package's folder, the package included."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def edges(root: Path) -> Iterator[tuple[str, int, str]]:
    """(module, line, imported module) of every import within the package."""
    known = modules(root)
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        imports = _Imports(package)
        imports.visit(ast.parse(path.read_text(encoding="utf-8")))
        for line, target in imports.found:
            if target.split(".")[0] != root.name:
                continue
            # `from expunge.files import replacing` names a thing in a module: cut to the module.
            yield name, line, _longest(target, known)


def _longest(name: str, known: dict[str, Path]) -> str:
    while name not in known:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    """The room that a module is in; the package's own ``__init__`` is in none: ''."""
    return [*module.split("."), ""][1]


def offences(root: Path, rooms: list[str] = ROOMS) -> list[str]:
    """Every import that points upward, every circle, every room that the list lacks."""
    found = [f"no place in the order for {name}" for name in sorted(_rooms(root) - set(rooms))]
    siblings: dict[str, dict[str, set[str]]] = {}
    for source, line, target in edges(root):
        here, there = room(source), room(target)
        if not here:
            continue  # expunge/__init__.py stands above all rooms
        if here == there:
            siblings.setdefault(here, {}).setdefault(source, set()).add(target)
        elif not there or ({here, there} <= set(rooms) and rooms.index(here) > rooms.index(there)):
            found.append(f"{source}, line {line}: imports {target}, which is above it")
    for graph in siblings.values():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(f"circle: {' -> '.join(error.args[1])}")
    return found


def _rooms(root: Path) -> set[str]:
    return {room(name) for name in modules(root)} - {""}


def test_imports_point_downward() -> None:
    assert offences(PACKAGE) == []


def test_the_walk_sees_the_package() -> None:
    """A control: known imports are among those found, the ones inside functions too."""
    found = {(source, target) for source, _, target in edges(PACKAGE)}
    assert ("expunge.training.loop", "expunge.model.segment") in found
    assert ("expunge.cli.runs", "expunge.run") in found  # inside a function
    assert ("expunge.tables", "expunge.plan") not in found  # under TYPE_CHECKING
    assert len(_rooms(PACKAGE)) > 15


# ---- controls on a planted tree


def plant(folder: Path, **files: str) -> Path:
    """A package ``expunge`` of three rooms, ``run`` above ``model`` above ``errors``."""
    root = folder / "expunge"
    default = {
        "__init__": "from expunge import run",
        "run": "from expunge.model.segment import Segment",
        "model/__init__": "",
        "model/segment": "from expunge.errors import ExpungeError\nimport torch",
        "model/patch": "from expunge.model.segment import Segment",
        "errors": "",
    }
    for name, text in {**default, **files}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


ORDER = ["run", "model", "errors"]


def test_a_planted_tree_in_order_passes(tmp_path: Path) -> None:
    assert offences(plant(tmp_path), ORDER) == []


@pytest.mark.parametrize(
    "text",
    [
        "from expunge.run import run",
        "import expunge.run",
        "from expunge import run",
        "def f():\n    from expunge.run import run",
        "from ..run import run",
        "from .. import run",
        "try:\n    import expunge.run\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import expunge.run",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, text: str) -> None:
    (found,) = offences(plant(tmp_path, **{"model/segment": text}), ORDER)
    assert "expunge.model.segment, line" in found and "imports expunge.run" in found


def test_the_packages_own_names_are_above_every_room(tmp_path: Path) -> None:
    (found,) = offences(plant(tmp_path, errors="from expunge import Patch"), ORDER)
    assert "expunge.errors, line 1: imports expunge, " in found


def test_an_import_for_type_checkers_only_passes(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from expunge.run import run"
    assert offences(plant(tmp_path, **{"model/segment": text}), ORDER) == []


@pytest.mark.parametrize(
    "text", ["from expunge.model.patch import Patch", "from .patch import Patch"]
)
def test_a_circle_inside_a_room_is_found(tmp_path: Path, text: str) -> None:
    (found,) = offences(plant(tmp_path, **{"model/segment": text}), ORDER)
    assert found.startswith("circle: ") and "expunge.model.patch" in found


def test_a_new_room_needs_a_place(tmp_path: Path) -> None:
    assert offences(plant(tmp_path, attic=""), ORDER) == ["no place in the order for attic"]
