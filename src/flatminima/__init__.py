"""Which minimum generalizes better, and how to train to it: the Fisher information, for PyTorch."""

from typing import TYPE_CHECKING

from flatminima.faces import on_demand

if TYPE_CHECKING:
    from flatminima.exact import exact_fisher, exact_gamma, exact_hessian
    from flatminima.gramian import gram
    from flatminima.loss_landscape import Landscape, landscape
    from flatminima.losses import BinaryCrossEntropy, CrossEntropy
    from flatminima.measures import (
        Characterization,
        Comparison,
        Estimate,
        MeasureOptions,
        compare,
        comparison_of,
        measure,
    )
    from flatminima.pages.comparison import report
    from flatminima.regularizer import FisherTraceRegularizer, Suggestion, suggest
    from flatminima.theory import (
        fia_criterion,
        fia_criterion_of,
        gamma_from_subsets,
        pac_bayes_bound,
        pac_bayes_bound_of,
    )
    from flatminima.tracking import Tracker
else:  # the command line answers `--help` without torch
    __getattr__, __dir__ = on_demand(
        __name__,
        {
            "errors": (),
            "exact": ("exact_fisher", "exact_gamma", "exact_hessian"),
            "files": (),
            "gramian": ("gram",),
            "loss_landscape": ("Landscape", "landscape"),
            "losses": ("BinaryCrossEntropy", "CrossEntropy"),
            "measures": (
                "Characterization",
                "Comparison",
                "Estimate",
                "MeasureOptions",
                "compare",
                "comparison_of",
                "measure",
            ),
            "network": (),
            "pages": (),
            "pages.comparison": ("report",),
            "palette": (),
            "pictures": (),
            "parallel": (),
            "progress": (),
            "regularizer": ("FisherTraceRegularizer", "Suggestion", "suggest"),
            "sampling": (),
            "tables": (),
            "theory": (
                "fia_criterion",
                "fia_criterion_of",
                "gamma_from_subsets",
                "pac_bayes_bound",
                "pac_bayes_bound_of",
            ),
            "torch_compat": (),
            "tracking": ("Tracker",),
        },
    )

__all__ = [
    "BinaryCrossEntropy",
    "Characterization",
    "Comparison",
    "CrossEntropy",
    "Estimate",
    "FisherTraceRegularizer",
    "Landscape",
    "MeasureOptions",
    "Suggestion",
    "Tracker",
    "compare",
    "comparison_of",
    "exact_fisher",
    "exact_gamma",
    "exact_hessian",
    "fia_criterion",
    "fia_criterion_of",
    "gamma_from_subsets",
    "gram",
    "landscape",
    "measure",
    "pac_bayes_bound",
    "pac_bayes_bound_of",
    "report",
    "suggest",
]
