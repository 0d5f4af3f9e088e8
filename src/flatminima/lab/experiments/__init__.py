"""The paper's experiments: runs, sizes, search, costs, and what the records show."""

from flatminima.lab.experiments.analysis import summarize
from flatminima.lab.experiments.archive import Archive
from flatminima.lab.experiments.experiment import (
    INDICATORS,
    NORMALIZED,
    Experiment,
    Record,
    Setting,
    Task,
    look_up,
    perform,
    select,
)
from flatminima.lab.experiments.files import json_of, read_summaries, read_winners, winners_of, write_winners
from flatminima.lab.experiments.ledger import write_ledger
from flatminima.lab.experiments.paper import (
    EXPERIMENTS,
    MATCHED_COST,
    PLAIN,
    REGULARIZED,
    Winners,
    build_experiment,
    described,
    registered,
)
from flatminima.lab.experiments.presets import PRESETS, Preset
from flatminima.lab.experiments.search import SearchTrial, Tuning, expected, perform_search_trial
from flatminima.lab.experiments.statistics import Difference, RankCorrelation, Spread, number, paired_difference
from flatminima.lab.experiments.summary import (
    SHORT_NAMES,
    Contrast,
    Published,
    SettingMeans,
    Summary,
    TrialSummary,
    Unfinished,
)

__all__ = [
    "EXPERIMENTS",
    "INDICATORS",
    "MATCHED_COST",
    "NORMALIZED",
    "PLAIN",
    "PRESETS",
    "REGULARIZED",
    "SHORT_NAMES",
    "Archive",
    "Contrast",
    "Difference",
    "Experiment",
    "Preset",
    "Published",
    "RankCorrelation",
    "Record",
    "SearchTrial",
    "Setting",
    "SettingMeans",
    "Spread",
    "Summary",
    "Task",
    "TrialSummary",
    "Tuning",
    "Unfinished",
    "Winners",
    "build_experiment",
    "described",
    "expected",
    "json_of",
    "look_up",
    "number",
    "paired_difference",
    "perform",
    "perform_search_trial",
    "read_summaries",
    "read_winners",
    "registered",
    "select",
    "summarize",
    "winners_of",
    "write_ledger",
    "write_winners",
]
