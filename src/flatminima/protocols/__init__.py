"""What counts as evidence that a measure works: rank statistics over a ledger of minima, with bootstrap intervals."""

try:
    import pandas  # noqa: F401
    import scipy  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"flatminima.protocols needs {missing.name}: pip install 'flatminima[protocols]'", name=missing.name
    ) from missing

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
