"""Results made of numbers, without a network."""

from __future__ import annotations

from typing import Any

import numpy as np

from flatminima.measures import Characterization, Comparison, Estimate, Settings, Share

TRIALS = 8


def characterization(
    residual: float = -600.0,
    rest: float = 250.0,
    *,
    draw: int = 0,
    train_loss: float = 1e-3,
    accuracy: float | None = 1.0,
    parameters: int = 1000,
    shares: bool = False,
    **settings: Any,
) -> Characterization:
    """A minimum whose parts have about these means; other numbers are of γ̂'s noise."""
    noise = np.random.default_rng(draw).normal(size=(3, TRIALS))
    found = {
        "residual": residual + 5 * noise[0],
        "sensitivity": rest + 40 + noise[1],
        "diversity": -40 + 0.3 * noise[2],
    }
    found["log_det_unit_fisher"] = found["sensitivity"] + found["diversity"]
    found["log_det_fisher"] = found["residual"] + found["log_det_unit_fisher"]
    for place, name in enumerate(("spectral_radius", "frobenius_norm", "fisher_frobenius_norm", "fisher_trace")):
        found[name] = 10.0**-place * (1 + 0.05 * noise[0])
    given = {"trials": TRIALS, "batchnorm": "eval", "logit_normalization": None, "scale_invariant": False, **settings}
    return Characterization(
        **{name: Estimate.of(values.tolist()) for name, values in found.items()},
        others={"parameter_norm": Estimate.of([12.5 + draw] * TRIALS)},
        spectrum=tuple((100.0 * 0.8 ** np.arange(20)).tolist()),
        train_loss=train_loss,
        train_accuracy=accuracy,
        num_parameters=parameters,
        num_samples=500,
        singular_trials=(),
        shares=shares_of_four_parameters() if shares else None,
        settings=Settings(
            **{
                "loss": "cross_entropy",
                "fisher": "empirical",
                "subset_size": 20,
                "seed": 0,
                "robustness_samples": None,
                "generic_parameters": [],
                "dtype": "float32",
                "device": "cpu",
                "torch_version": "2.6.0",
                "flatminima_version": "0.1.0",
                **given,
            }
        ),
    )


def shares_of_four_parameters() -> dict[str, Share]:
    """A half, a quarter, an eighth and an eighth of the Fisher trace."""
    fractions = {"body.0.weight": 0.5, "body.0.bias": 0.25, "body.1.weight": 0.125, "head.weight": 0.125}
    return {name: Share(Estimate.of([part] * TRIALS), None, 20) for name, part in fractions.items()}


def comparison(**minima: Characterization) -> Comparison:
    """Of those given."""
    return Comparison(dict(minima))
