from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from flatminima.lab.experiments.statistics import RankCorrelation, Spread, paired_difference
from flatminima.lab.experiments.statistics import rank_correlation as in_short
from flatminima.protocols import Evidence, Ledger

ROOT = Path(__file__).parents[3]


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(math.sqrt(7)), 3)
    assert math.isnan(Spread.of([1.0]).std)


def rank_correlation(values: list[float], errors: list[float], settings: list[str]) -> RankCorrelation:
    """Of minima whose seeds are not named."""
    frame = pd.DataFrame({"measure": values, "error": errors, "setting": settings})
    return in_short(Evidence.of(Ledger.of(frame, error="error", hyper_parameters=["setting"]), "measure"))


def test_rank_correlation_over_models_and_over_settings() -> None:
    values, errors = [1.0, 2.0, 3.0, 4.0, 6.0, 5.0], [0.1, 0.3, 0.2, 0.4, 0.5, 0.6]
    found = rank_correlation(values, errors, ["a", "a", "b", "b", "c", "c"])
    assert found.tau == pytest.approx(stats.kendalltau(values, errors).statistic)
    assert found.tau_of_settings == 1  # means 1.5, 3.5, 5.5 and 0.2, 0.3, 0.55
    assert found.low <= found.tau <= found.high
    assert found == rank_correlation(values, errors, ["a", "a", "b", "b", "c", "c"])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_published_intervals_are_found_again(number: int) -> None:
    """Those of results/ were computed before scipy did it: the same resamples, and so the same intervals."""
    (summary,) = json.loads((ROOT / f"results/small/scenario-{number}.json").read_text(encoding="utf-8"))
    records = summary["records"]
    for name, published in summary["correlations"].items():
        values = [record["indicators"][name] for record in records]
        errors, cases = [record["test_error"] for record in records], [record["case"] for record in records]
        assert asdict(rank_correlation(values, errors, cases)) == pytest.approx(published, rel=1e-12)


def test_rank_correlation_of_a_constant_is_undefined() -> None:
    assert math.isnan(rank_correlation([1.0, 1.0], [0.4, 0.5], ["s", "s"]).tau)


def test_paired_difference_and_its_tests_are_scipys() -> None:
    first = {0: 1.0, 1: 2.0, 2: 4.0, 3: 1.5, 9: 100.0}
    second = {3: 2.0, 2: 1.0, 1: 1.0, 0: 1.25}
    differences = [-0.25, 1.0, 3.0, -0.5]
    found = paired_difference(first, second)
    assert found is not None
    low, high = stats.t.interval(0.95, 3, loc=0.8125, scale=stats.sem(differences))
    assert (found.mean, found.low, found.high, found.pairs) == pytest.approx((0.8125, low, high, 4))
    assert not found.clear
    assert found.below == 2
    pairs = ([1.0, 2.0, 4.0, 1.5], [1.25, 1.0, 1.0, 2.0])
    assert found.p_t == pytest.approx(stats.ttest_rel(*pairs).pvalue)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(*pairs).pvalue)
    assert found.p_sign == 1


def test_sign_test_of_five_pairs_on_one_side() -> None:
    found = paired_difference(dict.fromkeys(range(5), 0.0), {k: 1.0 + k for k in range(5)})
    assert found is not None
    assert found.p_sign == pytest.approx(2 / 2**5)
    assert found.clear


@pytest.mark.parametrize("other", [1.0, 2.0])
def test_a_single_pair_proves_nothing(other: float) -> None:
    found = paired_difference({0: 1.0}, {0: other})
    assert found is not None
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert math.isnan(found.p_t)
    assert paired_difference({0: 1.0}, {1: other}) is None


@pytest.mark.filterwarnings("error")
def test_differences_that_are_equal_but_for_rounding_do_not_vary() -> None:
    found = paired_difference({0: 30 / 500, 1: 20 / 500}, {0: 20 / 500, 1: 10 / 500})
    assert found is not None
    assert 30 / 500 - 20 / 500 != 20 / 500 - 10 / 500
    assert found.mean == pytest.approx(0.02)
    assert math.isnan(found.p_t)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_differences_of_as_many_images_are_ties() -> None:
    """Wilcoxon's test ranks them: as fractions of 500 images they differ by rounding."""
    counts = [34, 35, 22, 11, 48], [35, 37, 20, 9, 47]
    first, second = ({seed: count / 500 for seed, count in enumerate(some)} for some in counts)
    found = paired_difference(first, second)
    assert found is not None
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(*counts).pvalue)
    assert found.p_wilcoxon != pytest.approx(stats.wilcoxon([first[k] - second[k] for k in first]).pvalue)
