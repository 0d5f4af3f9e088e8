"""One training run: its description, its folder, its training and its measures."""

from typing import TYPE_CHECKING

from flatminima.faces import on_demand

if TYPE_CHECKING:
    from flatminima.lab.runs.checkpoints import Checkpoint, in_order, said_order
    from flatminima.lab.runs.folder import RunFolder
    from flatminima.lab.runs.measuring import (
        compare_loaded,
        compare_runs,
        kept_measures,
        measure_images,
        measure_run,
    )
    from flatminima.lab.runs.measuring_options import Measuring
    from flatminima.lab.runs.networks import LoadedNetwork, load_checkpoint, load_network, load_networks
    from flatminima.lab.runs.own_measures import selection_of
    from flatminima.lab.runs.records import RunProgress, RunResult
    from flatminima.lab.runs.schedules import Approach, Landing, MultiStep, OneCycle
    from flatminima.lab.runs.session import Session
    from flatminima.lab.runs.sets import TrainingSets
    from flatminima.lab.runs.spec import (
        RECIPES,
        FisherPenaltySpec,
        GradientNormSpec,
        Regularizer,
        RegularizerSpec,
        RunSpec,
        SharpnessAwareSpec,
        UnitResidualSpec,
        name_of_run,
        with_kinds,
    )
    from flatminima.lab.runs.tracked import Subject, TrackedCheckpoint, measure_checkpoints
    from flatminima.lab.runs.training import Stop, launch, train
else:  # the command line reads descriptions without torch
    __getattr__, __dir__ = on_demand(
        __name__,
        {
            "checkpoints": ("Checkpoint", "in_order", "said_order"),
            "folder": ("RunFolder",),
            "measuring": (
                "compare_loaded",
                "compare_runs",
                "kept_measures",
                "measure_images",
                "measure_run",
            ),
            "measuring_options": ("Measuring",),
            "networks": ("LoadedNetwork", "load_checkpoint", "load_network", "load_networks"),
            "own_measures": ("selection_of",),
            "records": ("RunProgress", "RunResult"),
            "schedules": ("Approach", "Landing", "MultiStep", "OneCycle"),
            "session": ("Session",),
            "sets": ("TrainingSets",),
            "spec": (
                "RECIPES",
                "FisherPenaltySpec",
                "GradientNormSpec",
                "Regularizer",
                "RegularizerSpec",
                "RunSpec",
                "SharpnessAwareSpec",
                "UnitResidualSpec",
                "name_of_run",
                "with_kinds",
            ),
            "tracked": ("Subject", "TrackedCheckpoint", "measure_checkpoints"),
            "training": ("Stop", "launch", "train"),
        },
    )

__all__ = [
    "RECIPES",
    "Approach",
    "Checkpoint",
    "FisherPenaltySpec",
    "GradientNormSpec",
    "Landing",
    "LoadedNetwork",
    "Measuring",
    "MultiStep",
    "OneCycle",
    "Regularizer",
    "RegularizerSpec",
    "RunFolder",
    "RunProgress",
    "RunResult",
    "RunSpec",
    "Session",
    "SharpnessAwareSpec",
    "Stop",
    "Subject",
    "TrackedCheckpoint",
    "TrainingSets",
    "UnitResidualSpec",
    "compare_loaded",
    "compare_runs",
    "in_order",
    "kept_measures",
    "launch",
    "load_checkpoint",
    "load_network",
    "load_networks",
    "measure_checkpoints",
    "measure_images",
    "measure_run",
    "name_of_run",
    "said_order",
    "selection_of",
    "train",
    "with_kinds",
]
