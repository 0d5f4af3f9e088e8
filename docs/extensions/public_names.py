"""What the reference needs of docstrings and names: public names have one page each, and formulas are no markup."""

from __future__ import annotations

import re
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

_CODE = re.compile(r"(``.*?``)")


def resolve(app: Sphinx, env: BuildEnvironment, reference: pending_xref, content: Element) -> Element | None:
    """``flatminima.measures.results.Estimate`` leads to ``flatminima.Estimate``, where the name is documented."""
    if reference.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    parts = str(reference.get("reftarget", "")).split(".")
    for length in (2, 1):  # a method or attribute of a class; a class or function
        ending = ".".join(parts[-length:])
        found = [name for name in domain.objects if f".{name}".endswith(f".{ending}")]  # type: ignore[attr-defined]
        if found and len(parts) >= length:
            home = min(found, key=lambda name: name.count("."))
            return domain.resolve_xref(env, reference["refdoc"], app.builder, "obj", home, reference, content)
    return None


def skip(app: Sphinx, what: str, name: str, member: Any, skipped: bool, options: Any) -> bool | None:
    """Of ``flatminima.errors`` show the classes alone: its functions are for the library itself."""
    is_function = not isinstance(member, type) and callable(member)
    return True if is_function and getattr(member, "__module__", None) == "flatminima.errors" else None


def prepare(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Keep what napoleon and reStructuredText would take for markup: |w|, and a colon in a first line.

    In Google's style the words before a colon are a type where something is returned or an attribute is explained.
    Here annotations say the type, and what stands there is text.
    """
    prepared = [] if what in ("class", "function", "method", "module", "exception") else ["\\"]
    for line in lines:
        pieces = _CODE.split(line)
        prepared.append("".join(p if p.startswith("``") else p.replace("|", r"\|") for p in pieces))
        if line.strip() in ("Returns:", "Yields:"):
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            prepared.append(f"{indent}\\")
    lines[:] = prepared


def repair(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Put the return type before the heading of examples: sphinx-autodoc-typehints may leave it right behind."""
    for place in range(len(lines) - 1):
        if lines[place].startswith(".. rubric::") and lines[place + 1].startswith(":rtype:"):
            lines[place : place + 2] = [lines[place + 1], "", lines[place]]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect them; the priority of napoleon and of the type hints is 500."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", prepare, priority=400)
    app.connect("autodoc-process-docstring", repair, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
