"""The rules of the house that a folder tree cannot show by itself; the order of layers is import-linter's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGES = sorted(
    (".".join(face.parent.relative_to(SOURCE).parts) for face in (SOURCE / "flatminima").rglob("*/__init__.py")),
    key=len,
    reverse=True,
)
OPEN = ("flatminima.lab", "flatminima.integrations")
"""Packages whose files are their face: what they hold has little in common."""
FILES = [path for folder in ("src", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports from flatminima."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flatminima":
            yield from ((node.module or "", alias.name) for alias in node.names)


def package_of(module: str) -> str | None:
    """The innermost package that has a face and holds the module."""
    return next((p for p in PACKAGES if p not in OPEN and f"{module}.".startswith(f"{p}.")), None)


@pytest.mark.parametrize("path", [p for p in FILES if "tests" not in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_past_a_packages_face(path: Path) -> None:
    own = ".".join(path.relative_to(SOURCE).with_suffix("").parts) if SOURCE in path.parents else ""
    for module, name in imports(path):
        package = package_of(module)
        if package is not None and not f"{own}.".startswith(f"{package}."):
            assert module == package, f"import {name} from {package}, not from {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_an_underscored_name_never_leaves_its_file(path: Path) -> None:
    assert not [f"{module}.{name}" for module, name in imports(path) if name.startswith("_")]
    assert not path.stem.startswith("_") or path.stem.startswith("__")


def test_no_file_has_outgrown_its_room() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 450} == {}
