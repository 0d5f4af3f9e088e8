"""Programs of the gallery, run with smaller settings."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, **settings: Any) -> dict[str, Any]:
    """Run a program whose constants, set once each at its top, have other values; returns its names."""
    path = EXAMPLES / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left = dict(settings)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in left:
            node.value = ast.copy_location(ast.parse(repr(left.pop(node.targets[0].id)), mode="eval").body, node.value)
    if left:
        raise ValueError(f"{path.name} has no constants {', '.join(left)}")
    module = ModuleType(f"example_{name}")
    sys.modules[module.__name__] = module  # where functions and annotations look
    try:
        exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    return vars(module)
