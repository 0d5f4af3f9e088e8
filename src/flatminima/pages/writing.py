"""Pages from templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from flatminima.files import write_file

_HOME = "flatminima.pages"


def write_page(path: Path, template: str, *, package: str = _HOME, **context: Any) -> None:
    """Render a template and write the page as a whole.

    Args:
        path: The page.
        template: Its file's name.
        package: Whose folder ``templates`` it lies in; those of this package are there to be extended.
        context: What it shows.

    Raises:
        FlatminimaError: The disk is full, or the folder cannot be written to.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, _HOME))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_file(path, environment.get_template(template).render(context))
