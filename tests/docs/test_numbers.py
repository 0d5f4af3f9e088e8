"""The README's numbers are those of the committed records."""

from __future__ import annotations

import importlib
import json
import math
import re
import statistics
from types import ModuleType

import pytest

from flatminima.lab.experiments import PRESETS
from flatminima.lab.experiments.paper import MATCHED, PLAIN, REGULARIZED, SAM, build_experiment
from flatminima.lab.experiments.statistics import paired_difference
from flatminima.lab.names import Protocol
from flatminima.theory import gamma_from_subsets, pac_bayes_bound
from support.documents import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEDIUM = (ROOT / "docs" / "results" / "medium.md").read_text(encoding="utf-8")
LABEL_NOISE = (ROOT / "docs" / "how-to" / "label-noise.md").read_text(encoding="utf-8")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("extensions.readme")


def intervals_of(page: str) -> set[tuple[str, ...]]:
    """Value and interval of each cell that has one; over minima, where that over settings stands between."""
    return set(re.findall(r"[+]?(-?\d\.\d\d)(?: \([+-]\d\.\d\d\))? \\\[(-?\d\.\d\d), (-?\d\.\d\d)\\\]", page))


def section_of(page: str, title: str) -> str:
    return next(part for part in page.split("## ") if part.startswith(title))


def test_its_tables_are_those_of_the_records(made: ModuleType) -> None:
    assert made.with_tables(README) == README, "run make numbers"


def test_a_table_that_has_lost_its_place_is_missed(made: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 places for the table gram"):
        made.with_tables(README.replace("<!-- gram -->", ""))


def test_intervals_in_the_text_are_those_of_the_table_or_the_record(made: ModuleType) -> None:
    """What is said of measures in words has its number in a record: Kendall's τ, or a partial one."""
    said = set(re.findall(r"(−?\d\.\d\d)\s\[(−?\d\.\d\d), (−?\d\.\d\d)\]", README.split("<!-- /rankings -->")[1]))
    known = set(re.findall(r"(-?\d\.\d\d) \[(-?\d\.\d\d), (-?\d\.\d\d)\]", made.rankings()))
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "results").glob("*/*.md")))
    known |= intervals_of(pages)
    assert len(said) >= 3
    assert {tuple(number.replace("−", "-") for number in numbers) for numbers in said} <= known


@pytest.mark.parametrize(
    ("title", "record"),
    [
        ("Scenario I:", "medium/scenario-1"),
        ("Scenario II:", "medium/scenario-2"),
        ("Scenario III:", "medium/scenario-3"),
        ("Scenario III at matched loss", "medium-matched/scenario-3"),
        ("Scenario I at matched loss", "medium-matched/scenario-1"),
        ("Scenario II at matched loss", "medium-matched/scenario-2"),
    ],
)
def test_what_is_said_of_the_middle_size_is_in_its_record(title: str, record: str) -> None:
    section = section_of(MEDIUM, title).replace("−", "-")
    number = r"(-?\d\.\d\d)"
    said = set(re.findall(rf"{number}[a-z ]* \((?:95 % interval )?{number} to {number}\)", section))
    assert len(said) >= 5
    assert said <= intervals_of((ROOT / "results" / f"{record}.md").read_text(encoding="utf-8"))


def test_how_often_measures_follow_is_what_the_readme_says(made: ModuleType) -> None:
    whole = [found for size in made.SIZES for found in made.rankings_of(size).values() if found is not None]
    assert len(whole) == 12

    def counts(name: str) -> tuple[int, int]:
        """In how many experiments a measure follows, and in how many it goes against."""
        found = [summary.correlations[name] for summary in whole if name in summary.correlations]
        return sum(tau.low > 0 for tau in found), sum(tau.high < 0 for tau in found)

    assert counts("log_det_fisher") == counts("log_det_unit_fisher") == (10, 2)
    assert counts("effective_dimension") == (11, 1)
    assert counts("stable_rank") == (10, 1)
    assert counts("spectral_radius")[1] == counts("frobenius_norm")[1] == 5
    assert counts("robustness")[1] == 2
    others = {name for summary in whole for name in summary.correlations} - {"effective_dimension"}
    assert max(counts(name)[0] for name in others) == 10


def test_what_is_said_to_follow_in_all_experiments_of_the_middle_size_does() -> None:
    records = [
        json.loads(path.read_text(encoding="utf-8"))[0]
        for path in sorted((ROOT / "results").glob("medium*/scenario-*.json"))
    ]
    found = [record["evaluation"]["measures"] for record in records if not record["left"]]
    assert len(found) == 6

    def follow(correlation: str) -> dict[str, int]:
        """In how many experiments a measure's interval is above zero."""
        return {name: sum(measures[name][correlation]["interval"][0] > 0 for measures in found) for name in found[0]}

    everywhere = {name for name, count in follow("kendall").items() if count == len(found)}
    assert everywhere == {"log_det_fisher", "residual", "effective_dimension", "stable_rank"}
    beyond = follow("partial_kendall")
    assert [beyond[name] for name in ("log_det_fisher", "log_det_unit_fisher")] == [6, 3]
    assert [beyond[name] for name in ("effective_dimension", "stable_rank")] == [5, 5]


def test_what_is_said_of_the_middle_sizes_regularizer_is_in_its_records() -> None:
    section = section_of(MEDIUM, "Tables 1 and 2").replace("−", "-")
    difference = r"([+-]\d+\.\d\d)[a-z ]* \((?:95 % interval )?([+-]\d+\.\d\d) to ([+-]\d+\.\d\d)\)"
    said = set(re.findall(difference, section))
    assert len(said) >= 3
    assert set(re.findall(difference, README.replace("−", "-"))) <= said
    records = [(ROOT / "results" / "medium" / f"table-{k}.md").read_text(encoding="utf-8") for k in (1, 2)]
    assert said <= set(re.findall(difference, "".join(records)))


@pytest.mark.parametrize(
    ("title", "protocol", "name"),
    [
        ("Scenario I", "paper", "scenario-1"),
        ("Scenario II", "paper", "scenario-2"),
        ("Scenario III", "paper", "scenario-3"),
        ("Scenario I", "matched", "scenario-1"),
        ("Scenario II", "matched", "scenario-2"),
        ("Scenario III", "matched", "scenario-3"),
        ("Search for β", "paper", "search"),
        ("Tables 1 and 2", "paper", "table-1"),
    ],
)
def test_the_runs_named_as_missing_are_those_that_the_records_lack(title: str, protocol: Protocol, name: str) -> None:
    experiment = build_experiment(name, PRESETS["medium"].under(protocol), chosen={}, data=None, seeds=None)
    planned = len(experiment.settings) * len(experiment.seeds)
    folder = ROOT / "results" / ("medium" if protocol == "paper" else "medium-matched")
    ended = 0
    if (folder / f"{name}.json").is_file():
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))[0]
        ended = len(record["records"]) + len(record["failures"])
    assert f"| {title} | `{protocol}` | {planned} | {planned - ended} |" in MEDIUM


def test_what_is_said_of_early_stopping_is_in_its_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "early_stopping.json").read_text(encoding="utf-8"))["runs"]
    digits = (ROOT / "docs" / "results" / "digits.md").read_text(encoding="utf-8")
    kept, between, later = [], [], []
    for arms in record.values():
        stopped = {arm: {seed: stop(run) for seed, run in runs.items()} for arm, runs in arms.items()}
        ends = {arm: {seed: 100 * run["test_error"][-1] for seed, run in runs.items()} for arm, runs in arms.items()}
        plain, early, end = (statistics.fmean(d.values()) for d in (ends[PLAIN], stopped[PLAIN], ends[REGULARIZED]))
        kept.append(f"{100 * (plain - early) / (plain - end):.0f}")
        found = paired_difference(ends[REGULARIZED], stopped[PLAIN])
        assert found is not None
        assert (found.below, found.pairs) == (5, 5)
        between.append(f"{found.mean:.2f} ({found.low:+.2f} to {found.high:+.2f})")
        later.append(f"{statistics.fmean(stopped[REGULARIZED].values()) - end:.2f}")
    said = LABEL_NOISE.replace("−", "-")
    assert f"by {between[0].replace(' (', ' points (')} and {between[1]}" in said
    assert f"({later[0]} and {later[1]} points)" in said
    for text in (LABEL_NOISE, digits, README):
        assert f"{kept[0]} and {kept[1]} % of the" in text


def test_what_is_said_of_early_stopping_on_cifar_is_in_its_record() -> None:
    path = ROOT / "benchmarks" / "results" / "early_stopping-cifar.json"
    ((_, arms),) = json.loads(path.read_text(encoding="utf-8"))["runs"].items()
    ends = {seed: 100 * run["test_error"][-1] for seed, run in arms[PLAIN].items()}
    found = paired_difference({seed: stop(run) for seed, run in arms[PLAIN].items()}, ends)
    assert found is not None
    said = LABEL_NOISE.replace("−", "-")
    assert f"changes by {found.mean:.2f} points ({found.low:.2f} to {found.high:.2f})" in said
    found = paired_difference(middle_errors(NOT_AUGMENTED, REGULARIZED), middle_errors(NOT_AUGMENTED, PLAIN))
    assert found is not None
    assert f"held out, by {found.mean:.2f} ({found.low:.2f} to {found.high:.2f})" in said


NOT_AUGMENTED = "20 % label noise, no-aug"


def middle_errors(case: str, arm: str) -> dict[int, float]:
    """Test errors of the middle size's Table 1 by seed, in percent."""
    records = json.loads((ROOT / "results" / "medium" / "table-1.json").read_text(encoding="utf-8"))[0]["records"]
    return {
        found["seed"]: 100 * found["test_error"] for found in records if (found["case"], found["arm"]) == (case, arm)
    }


def test_mean_errors_of_the_middle_size_under_label_noise_are_those_of_its_record() -> None:
    plain, regularized, rare, crops, longer = (
        f"{statistics.fmean(middle_errors(case, arm).values()):.1f}"
        for case, arm in [
            (NOT_AUGMENTED, PLAIN),
            (NOT_AUGMENTED, REGULARIZED),
            (NOT_AUGMENTED, f"{REGULARIZED}, every=10"),
            ("20 % label noise", PLAIN),
            ("20 % label noise", MATCHED),
        ]
    )
    train = (ROOT / "docs" / "how-to" / "train.md").read_text(encoding="utf-8")
    for text in (README, LABEL_NOISE, MEDIUM):
        assert f"from {plain} to {regularized} %" in text
    assert f"({rare} % of the {plain}, where that leaves {regularized})" in README
    assert f"{crops} % with the same labels" in README
    assert f"({rare} %)" in LABEL_NOISE
    assert f"comes to {crops} % on the same labels" in LABEL_NOISE
    assert f"come to {longer} %" in LABEL_NOISE
    assert f"with 20 % {longer} %, less by" in MEDIUM
    assert f"{plain} % to {regularized} and {rare} " in train


def stop(run: dict[str, list[float]]) -> float:
    """The test error after the epoch with the least error on the held-out images, in percent."""
    errors = run["validation_error"]
    return 100 * run["test_error"][errors.index(min(errors))]


def test_the_regularizers_gain_over_ten_seeds_is_that_of_both_records() -> None:
    records = [
        record
        for folder in ("small", "small-fresh")
        for record in json.loads((ROOT / "results" / folder / "table-1.json").read_text(encoding="utf-8"))[0]["records"]
    ]
    errors: dict[str, dict[int, float]] = {}
    for record in records:
        errors.setdefault(record["arm"], {})[record["seed"]] = 100 * record["test_error"]
    page = (ROOT / "docs" / "results" / "small-fresh.md").read_text(encoding="utf-8")
    for against, pages in {PLAIN: (README, page), MATCHED: (README, page), SAM: (page,)}.items():
        found = paired_difference(errors[REGULARIZED], errors[against])
        assert found is not None
        assert found.pairs == 10
        gain, low, high = (f"{-value:.2f}".replace("-", "−") for value in (found.mean, found.high, found.low))
        for text in pages:
            assert gain in text
            assert f"{low} to {high}" in text


def test_the_bound_of_pac_bayes_is_as_far_too_low_as_its_page_says() -> None:
    """In scenarios I and II of the middle size; a wrong answer costs at least ln 2 nats."""
    bounds, losses = [], []
    for name in ("scenario-1", "scenario-2"):
        (found,) = json.loads((ROOT / "results" / "medium" / f"{name}.json").read_text(encoding="utf-8"))
        subset_size, parameters = found["measuring"]["subset_size"], 300_000
        for record in found["records"]:
            gamma_hat, train_loss = (record["indicators"][key] for key in ("log_det_fisher", "train_loss"))
            gamma = gamma_from_subsets(gamma_hat, num_parameters=parameters, subset_size=subset_size)
            bound = pac_bayes_bound(
                log_det_fisher=gamma,
                num_parameters=parameters,
                num_samples=10_000,
                train_loss=train_loss,
                log_volume=0.0,
                delta=0.05,
            )
            assert math.exp(gamma_hat / subset_size) / (4 * math.pi * math.e) < 0.005
            bounds.append(bound)
            losses.append(math.log(2) * record["test_error"])
    assert 0.07 < min(bounds) < max(bounds) < 0.1 < 0.13 < min(losses)
