"""The paper's experiments: runs, sizes, search, costs, and what the records show."""

from flatminima.lab.experiments.experiment import (
    INDICATORS,
    NORMALIZED,
    Experiment,
    Record,
    Setting,
    Task,
    look_up,
    perform,
    run_experiment,
    select,
    value_of,
)
from flatminima.lab.experiments.paper import EXPERIMENTS, MATCHED_COST, build_experiment
from flatminima.lab.experiments.presets import PRESETS, PresetName
from flatminima.lab.experiments.search import Trial, Tuning, expected, perform_trial
from flatminima.lab.experiments.summary import RIVALS, SHORT_NAMES, correlation, difference, plain, summarize

__all__ = [
    "EXPERIMENTS",
    "INDICATORS",
    "MATCHED_COST",
    "NORMALIZED",
    "PRESETS",
    "RIVALS",
    "SHORT_NAMES",
    "Experiment",
    "PresetName",
    "Record",
    "Setting",
    "Task",
    "Trial",
    "Tuning",
    "build_experiment",
    "correlation",
    "difference",
    "expected",
    "look_up",
    "perform",
    "perform_trial",
    "plain",
    "run_experiment",
    "select",
    "summarize",
    "value_of",
]
