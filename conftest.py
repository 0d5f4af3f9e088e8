"""What pytest leaves out: modules for a framework that is not installed cannot be imported for their doctests."""

from importlib.util import find_spec

FRAMEWORKS = {"accelerate": "accelerate", "lightning": "lightning", "transformers": "transformers"}

collect_ignore = [
    f"src/flatminima/integrations/{module}.py" for module, package in FRAMEWORKS.items() if find_spec(package) is None
]
