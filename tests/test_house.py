"""The rules of the house that a folder tree cannot show by itself; the order of layers is import-linter's."""

from __future__ import annotations

import ast
import functools
import importlib
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


@functools.cache
def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports from flatminima."""
    text = path.read_text(encoding="utf-8")
    if "flatminima" not in text:
        return []
    return [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flatminima"
        for alias in node.names
    ]


def package_of(module: str) -> str | None:
    """The innermost package that has a face and holds the module."""
    return next((p for p in PACKAGES if p not in OPEN and f"{module}.".startswith(f"{p}.")), None)


def test_nothing_imports_past_a_packages_face() -> None:
    for path in FILES:
        if "tests" in path.parts:
            continue
        own = ".".join(path.relative_to(SOURCE).with_suffix("").parts) if SOURCE in path.parents else ""
        for module, name in imports(path):
            package = package_of(module)
            if package is not None and not f"{own}.".startswith(f"{package}."):
                assert module == package, f"{path}: import {name} from {package}, not from {module}"


def faces_on_demand() -> dict[Path, tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]]:
    """Of every face that imports on demand: names by module as it is typed, and as it runs."""
    found = {}
    for face in SOURCE.rglob("__init__.py"):
        tree = ast.parse(face.read_text(encoding="utf-8"))
        package = ".".join(face.parent.relative_to(SOURCE).parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "on_demand":
                block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
                typed = {
                    str(n.module).removeprefix(f"{package}."): tuple(alias.name for alias in n.names)
                    for n in block.body
                    if isinstance(n, ast.ImportFrom)
                }
                found[face] = typed, ast.literal_eval(node.args[1])
    return found


def test_faces_on_demand_are_found() -> None:
    assert SOURCE / "flatminima" / "__init__.py" in faces_on_demand()


@pytest.mark.parametrize("face", faces_on_demand(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_face_on_demand_shows_at_run_time_what_it_shows_to_type_checkers(face: Path) -> None:
    typed, at_run_time = faces_on_demand()[face]
    assert {module: names for module, names in at_run_time.items() if names} == typed
    module = importlib.import_module(".".join(face.parent.relative_to(SOURCE).parts))
    assert sorted(module.__all__) == sorted(name for names in typed.values() for name in names)
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_an_underscored_name_never_leaves_its_file() -> None:
    for path in FILES:
        assert not [f"{module}.{name}" for module, name in imports(path) if name.startswith("_")], path
        assert not path.stem.startswith("_") or path.stem.startswith("__"), path


def is_private(name: str) -> bool:
    """Whether a dotted name has a part that starts with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


ATTRIBUTES = ("getattr", "hasattr", "setattr", "delattr")


def own_names(tree: ast.AST) -> set[str]:
    """What a file itself defines: functions, classes, variables, and attributes of ``self`` and ``cls``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
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
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ATTRIBUTES:
            found += [str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant)]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch._"):
            found.append(str(node.value))
    return [name for name in found if is_private(name) and name not in OTHERS_PRIVATE_NAMES]


def test_pytorchs_private_parts_are_for_torch_compat_alone() -> None:
    found = {path: private_names_of_others(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names and path.name != "torch_compat.py"} == {}


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


FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint"}
FACTORIES |= {"randn", "randperm", "tensor", "zeros"}


def without_a_device(source: str) -> list[str]:
    """Calls that put what they make on the user's default device: factories of tensors, and generators."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"
        if (call.func.attr in FACTORIES and all(keyword.arg != "device" for keyword in call.keywords))
        or (call.func.attr == "Generator" and not call.args and not call.keywords)
    ]


def test_the_library_makes_no_tensor_on_the_users_default_device() -> None:
    library = [path for path in (SOURCE / "flatminima").rglob("*.py") if "lab" not in path.parts]
    found = {str(path.relative_to(ROOT)): without_a_device(path.read_text(encoding="utf-8")) for path in library}
    assert {name: calls for name, calls in found.items() if calls} == {}, "say device='cpu', or whose it is"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("torch.randn(3)", 1),
        ("torch.zeros(3, device=x.device)", 0),
        ("torch.Generator().manual_seed(0)", 1),
        ("torch.Generator('cpu')", 0),
        ("x.new_zeros(3) + torch.zeros_like(x)", 0),
    ],
)
def test_calls_without_a_device_are_found(line: str, count: int) -> None:
    assert len(without_a_device(line)) == count


def test_no_file_has_outgrown_its_room() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 450} == {}
