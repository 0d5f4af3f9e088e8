"""What counts as evidence that a measure works: rank statistics over a ledger of minima, with bootstrap intervals."""

from importlib.util import find_spec

if _missing := [name for name in ("pandas", "scipy") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"flatminima.protocols needs {' and '.join(_missing)}: pip install 'flatminima[protocols]'", name=_missing[0]
    )

from flatminima.protocols.evaluation import Evaluation, Evidence, described, evaluate
from flatminima.protocols.findings import RESAMPLES, Finding
from flatminima.protocols.information import conditional_mutual_information
from flatminima.protocols.kendall import (
    granulated_kendall,
    kendall,
    kendall_of_settings,
    partial_correlation,
    partial_kendall,
    tau_b,
)
from flatminima.protocols.ledger import TEST_SIZE, Ledger, read_table
from flatminima.protocols.sign_error import SignError, sign_error

__all__ = [
    "RESAMPLES",
    "TEST_SIZE",
    "Evaluation",
    "Evidence",
    "Finding",
    "Ledger",
    "SignError",
    "conditional_mutual_information",
    "described",
    "evaluate",
    "granulated_kendall",
    "kendall",
    "kendall_of_settings",
    "partial_correlation",
    "partial_kendall",
    "read_table",
    "sign_error",
    "tau_b",
]
