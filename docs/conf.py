"""How the site is built: ``make docs``."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.deprecation import RemovedInSphinx10Warning

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore", category=RemovedInSphinx10Warning, module="sphinx_autodoc_typehints")

project = "flatminima"
author = "The flatminima authors"
project_copyright = author
release = version = version_of("flatminima")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "extensions.command_line",
    "extensions.public_names",
    "extensions.records",
]
exclude_patterns = ["_build", "extensions"]

html_theme = "furo"
html_title = f"flatminima {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nitpicky = True
suppress_warnings = [  # of what is imported for type checkers alone
    "sphinx_autodoc_typehints.forward_reference",
    "sphinx_autodoc_typehints.guarded_import",
]
# Names of other packages: their inventories lie elsewhere, and the site is built without a network.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|numpy|np|rich|matplotlib|os|scipy|lightning|transformers|accelerate|pandas|pd|collections|pathlib)\..*",
    ),
    (r"py:.*", r"(Tensor|nn\.\w+|\w*NDArray\w*)"),
    (r"py:.*", r"(optional|callable|Callable|ArrayLike|Path|Any|Trainer|LightningModule|Callback)"),
    (r"py:.*", r"(abc|collections|enum|os|pathlib|types|typing)\..*"),
    (r"py:.*", r"(None|bool|int|float|str|tuple|list|dict|set|frozenset|object|type|slice|Ellipsis)"),
    (r"py:.*", r"(ValueError|UserWarning|torch)"),
    # Names that are not public, though a public one mentions them.
    (
        r"py:.*",
        r"flatminima\.(files|network|pages|palette|parallel|pictures|tables|progress|sampling|torch_compat)\..*",
    ),
    (r"py:.*", r"flatminima\.gramian\.(checks|parts\.Part|rules\.base)"),
    (r"py:.*", r"flatminima\.measures\.hessian_products\.Hessian"),
    (r"py:.*", r"flatminima\.protocols\.ledger\.Minima"),
    (r"py:.*", r"(.*\.)?(Loss|PathName|Cost|Fisher|Measures|MeasureFunction|Inputs|Data|Labels|Closure)"),
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
always_use_bars_union = True
typehints_defaults = None
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Warns", "returns_style")]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "extensions.gallery_order.GalleryOrder",
    "capture_repr": (),
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "reset_modules": ("matplotlib",),
    "matplotlib_animations": False,
    "show_signature": False,
    "plot_gallery": True,
    "abort_on_example_error": True,
}
