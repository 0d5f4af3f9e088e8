"""One training run: its description, its folder, its training and its measures."""

from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.measuring import (
    Measuring,
    compare_loaded,
    compare_networks,
    compare_runs,
    kept_measures,
    measure_run,
)
from flatminima.lab.runs.networks import LoadedNetwork, load_network, load_networks
from flatminima.lab.runs.records import RunProgress, RunResult
from flatminima.lab.runs.session import Session
from flatminima.lab.runs.sets import TrainingSets
from flatminima.lab.runs.spec import (
    RECIPES,
    FisherPenaltySpec,
    GradientNormSpec,
    MultiStep,
    Regularizer,
    RegularizerSpec,
    RunSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)
from flatminima.lab.runs.training import Stop, launch, train

__all__ = [
    "RECIPES",
    "FisherPenaltySpec",
    "GradientNormSpec",
    "LoadedNetwork",
    "Measuring",
    "MultiStep",
    "Regularizer",
    "RegularizerSpec",
    "RunFolder",
    "RunProgress",
    "RunResult",
    "RunSpec",
    "Session",
    "SharpnessAwareSpec",
    "Stop",
    "TrainingSets",
    "UnitResidualSpec",
    "compare_loaded",
    "compare_networks",
    "compare_runs",
    "kept_measures",
    "launch",
    "load_network",
    "load_networks",
    "measure_run",
    "train",
]
