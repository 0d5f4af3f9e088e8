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
OPEN = ("flatminima.lab", "flatminima.integrations", "flatminima.pages")
"""Packages whose files are their face: what they hold, or need, has little in common."""
FILES = [path for folder in ("src", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]

OTHERS_PRIVATE_NAMES = {
    "_exit": "os, documented: leaves without what a handler or a lock would wait for",
    "_fields": "named tuples, documented: what they hold",
    "_getframe": "sys, documented: where a warning comes from",
    "_loss_shifts_labels": "Transformers, where it is there: whether it leaves the first token out of its count",
    "_make": "named tuples, documented: one of the same type",
    "_prepare_inputs": "Transformers, which has no other name for it: the batch as training_step sees it",
    "_trial_id": "Optuna, which has no other name for it: goes on with a trial that was begun",
}
"""Of other packages than PyTorch, whose are for ``torch_compat`` alone."""


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


def is_private(name: str) -> bool:
    """Whether a dotted name has a part that starts with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def own_names(tree: ast.AST) -> set[str]:
    """What a file itself defines: functions, classes, variables, and attributes of ``self`` and ``cls``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return found


def private_names_of_others(source: str) -> list[str]:
    """Underscored names that a file takes from elsewhere: imported, as attributes, or as attributes' names in text."""
    tree = ast.parse(source)
    own, found = own_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr not in own:
            found.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            found += [str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant)]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch._"):
            found.append(str(node.value))
    return [name for name in found if is_private(name) and name not in OTHERS_PRIVATE_NAMES]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_pytorchs_private_parts_are_for_torch_compat_alone(path: Path) -> None:
    if path.name != "torch_compat.py":
        assert private_names_of_others(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("torch._foreach_add(x, y)", ["_foreach_add"]),
        ("class Layer(nn.Module):\n    def held(self): return self._parameters", ["_parameters"]),
        ("class Layer:\n    def __init__(self): self._held = 1\n    def held(self, other): return other._held", []),
        ("layer._buffers = {}", ["_buffers"]),
        ("getattr(model, '_orig_mod', model)", ["_orig_mod"]),
        ("'torch._dynamo' in sys.modules", ["torch._dynamo"]),
        ("from torch._dynamo import config", ["torch._dynamo.config"]),
        ("from torch.nn.modules.batchnorm import _BatchNorm", ["torch.nn.modules.batchnorm._BatchNorm"]),
        ("from __future__ import annotations\nx.__dict__", []),
        ("sys._getframe()", []),
    ],
)
def test_private_parts_are_found(line: str, expected: list[str]) -> None:
    assert private_names_of_others(line) == expected


def test_no_file_has_outgrown_its_room() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 450} == {}
