"""Measures by name, by group, and the user's own."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, UndefinedMeasureError
from flatminima.measures import CATALOGUE, Characterization, Measure, Trial
from flatminima.measures.registry import catalogued, selected
from flatminima.sampling import draw_subsets
from support.minima import fitted

OPTIONS: dict[str, Any] = {"subset_size": 6, "trials": 4, "progress": False}


def largest_loss(trial: Trial) -> float:
    return trial.losses.max().item()


def largest_losses(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    return [losses[subset].max().item() for subset in draw_subsets(len(y), 6, 4, 0)]


def two_minima() -> tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]:
    first, x, y = fitted(1e-2)
    second, _, _ = fitted(0.8e-2)
    return {"first": first, "second": second}, (x, y)


def test_a_callable_is_a_measure_with_estimates_a_line_in_the_table_and_json() -> None:
    model, x, y = fitted(1e-2)
    c = fm.measure(model, (x, y), measures=largest_loss, **OPTIONS)
    expected = largest_losses(model, x, y)
    found = c.estimates()["largest_loss"]
    assert found.per_trial == pytest.approx(expected, rel=1e-9)
    assert found.mean == pytest.approx(statistics.fmean(expected), rel=1e-9)
    assert found.standard_error == pytest.approx(statistics.stdev(expected) / 2, rel=1e-9)
    assert list(c.estimates())[-1] == "largest_loss"  # after those of the catalogue
    assert re.search(rf"largest_loss\W+{found.mean:.6g}", str(c))
    assert Characterization.from_json(c.to_json()) == c


def test_a_callable_is_compared_pair_by_pair_and_ranked() -> None:
    models, data = two_minima()
    comparison = fm.compare(models, data, measures=["free", largest_loss], **OPTIONS)
    first, second = (largest_losses(model, *data) for model in models.values())
    difference = comparison.difference("first", "second", "largest_loss")
    assert difference.per_trial == pytest.approx([a - b for a, b in zip(first, second, strict=True)], rel=1e-9)
    assert comparison.ranks("largest_loss") == {"second": 1, "first": 2}
    assert "largest_loss" in str(comparison)
    kept = json.loads(comparison.to_json())["differences"]["largest_loss"]["first - second"]
    assert kept["per_trial"] == pytest.approx(list(difference.per_trial))


def test_where_larger_is_better_the_largest_has_rank_one() -> None:
    models, data = two_minima()
    mine = Measure("mine", largest_loss, "my largest loss", larger_is_better=True)
    comparison = fm.compare(models, data, measures=[mine, "margin", "fisher_trace"], **OPTIONS)
    assert comparison.ranks("mine") == {"first": 1, "second": 2}
    assert comparison.ranks("margin") == {"second": 1, "first": 2}
    assert comparison.ranks("fisher_trace") == {"second": 1, "first": 2}
    again = Characterization.from_json(comparison.characterizations["first"].to_json())
    assert again.settings.larger_is_better == ["margin", "mine"]


def test_a_minimum_without_a_value_has_no_rank() -> None:
    models, data = two_minima()

    def of_the_first(trial: Trial) -> float:
        return 1.0 if trial.train.loss > 0.9e-2 else float("nan")

    comparison = fm.compare(models, data, measures=of_the_first, **OPTIONS)
    assert comparison.ranks("of_the_first") == {"first": 1}
    assert re.search(r"of_the_first\W+1 +\(rank 1\)\W+nan +│", str(comparison))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (torch.zeros(3), r"a Tensor of shape \(3,\)"),
        (None, "a NoneType"),
        ("flat", "a str"),
    ],
)
def test_what_is_no_number_is_refused(found: object, said: str) -> None:
    def mine(trial: Trial) -> Any:
        return found

    model, x, y = fitted(1e-2)
    with pytest.raises(FlatminimaError, match=rf"measure 'mine' returned {said}: return one number"):
        fm.measure(model, (x, y), measures=mine, **OPTIONS)


@pytest.mark.parametrize("found", [2, True, torch.tensor(2.0), torch.tensor([2.0])])
def test_whatever_is_one_number_is_taken(found: Any) -> None:
    model, x, y = fitted(1e-2)
    c = fm.measure(model, (x, y), measures=Measure("mine", lambda trial: found, "mine"), **OPTIONS)
    assert c.estimates()["mine"].mean == float(found)


def of_another_name() -> Callable[[Trial], float]:
    def largest_loss(trial: Trial) -> float:
        return 0.0

    return largest_loss


def residual(trial: Trial) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (lambda trial: 0.0, "a measure needs a name, and .* has none: write it with def, or pass Measure"),
        (partial(largest_loss), "a measure needs a name"),
        (residual, "there are two measures 'residual': rename yours"),
        ([largest_loss, of_another_name()], "there are two measures 'largest_loss': rename yours"),
        ("marginn", r"unknown measure 'marginn' \(did you mean 'margin'\?\)"),
        (["free", "alll"], r"unknown measure 'alll' \(did you mean 'all'\?\)"),
        (3, "a measure is a name, a group or a callable of a trial, got int"),
        ([3], "a measure is a name, a group or a callable of a trial, got int"),
    ],
    ids=["lambda", "partial", "of the catalogue", "two", "name", "group", "number", "list of a number"],
)
def test_what_has_no_name_of_its_own_is_refused(measures: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        fm.measure(*fitted(1e-2)[:1], fitted(1e-2)[1:], measures=measures, **OPTIONS)


def test_the_same_measure_twice_is_taken_once() -> None:
    names = [m.name for m in selected(["margin", largest_loss, "margin", largest_loss, "free"]).measures]
    assert len(names) == len(set(names))
    assert {"margin", "largest_loss", "coherence"} <= set(names)


def test_no_two_of_the_catalogue_share_a_name_or_have_an_unknown_cost() -> None:
    with pytest.raises(FlatminimaError, match="there is a measure 'residual' already: rename the function"):
        catalogued("mine", cost="free", source="")(residual)
    with pytest.raises(FlatminimaError, match="unknown cost 'cheap'"):
        catalogued("mine", cost="cheap", source="")  # type: ignore[arg-type]


@pytest.mark.parametrize("through_data", [False, True])
def test_a_callable_that_changes_weights_is_refused(through_data: bool) -> None:
    model, x, y = fitted(1e-2)

    def pruned(trial: Trial) -> float:
        weight = next(trial.model.parameters())
        with torch.no_grad():
            (weight.data if through_data else weight).mul_(1 + 1e-6)
        return 0.0

    with pytest.raises(FlatminimaError, match=r"measure 'pruned' changed the model's weights.*copy\.deepcopy"):
        fm.measure(model, (x, y), measures=pruned, **OPTIONS)


def test_a_callable_that_changes_weights_in_a_later_trial_is_refused() -> None:
    model, x, y = fitted(1e-2)

    def late(trial: Trial) -> float:
        with torch.no_grad():
            next(trial.model.parameters()).mul_(1 + 1e-6 * trial.number)
        return 0.0

    with pytest.raises(FlatminimaError, match="measure 'late' changed the model's weights"):
        fm.measure(model, (x, y), measures=late, **OPTIONS)


def test_a_callable_that_puts_weights_back_to_the_bit_is_taken() -> None:
    model, x, y = fitted(1e-2)

    def rise(trial: Trial) -> float:
        weight = next(trial.model.parameters())
        with torch.no_grad():
            before = weight.clone()
            weight.mul_(1.1)
            value = torch.nn.functional.cross_entropy(trial.model(trial.inputs), trial.targets)
            weight.copy_(before)
        return float(value)

    plain = fm.measure(model, (x, y), **OPTIONS)
    found = fm.measure(model, (x, y), measures=["paper", rise], **OPTIONS)
    assert {name: value for name, value in found.estimates().items() if name != "rise"} == plain.estimates()
    assert found.estimates()["rise"].mean > 0


def test_what_a_callable_draws_repeats_whatever_else_is_measured() -> None:
    model, x, y = fitted(1e-2)

    def drawn(trial: Trial) -> float:
        return torch.rand((), generator=trial.generator()).item()

    def drawn_twice(trial: Trial) -> float:
        return drawn(trial) + drawn(trial)

    first = fm.measure(model, (x, y), measures=drawn, **OPTIONS).estimates()["drawn"]
    again = fm.measure(model, (x, y), measures=[drawn_twice, "cheap", drawn], **OPTIONS).estimates()
    assert again["drawn"] == first
    assert again["drawn_twice"].mean == 2 * first.mean
    assert len(set(first.per_trial)) == 4
    other = fm.measure(model, (x, y), measures=drawn, **{**OPTIONS, "seed": 1}).estimates()["drawn"]
    assert set(other.per_trial).isdisjoint(first.per_trial)


def test_a_callable_that_is_not_defined_says_so_by_name() -> None:
    model, x, y = fitted(1e-2)

    def mine(trial: Trial) -> float:
        raise UndefinedMeasureError("the network is too small")

    with pytest.raises(UndefinedMeasureError, match="mine is not defined here: the network is too small"):
        fm.measure(model, (x, y), measures=mine, **OPTIONS)


def test_a_callable_sees_the_model_itself_in_eval_mode_where_it_was_wrapped() -> None:
    model, x, y = fitted(1e-2)

    def sees_it(trial: Trial) -> float:
        return float(trial.model is model and not model.training and torch.is_grad_enabled())

    wrapped = nn.DataParallel(model.train())
    assert fm.measure(wrapped, (x, y), measures=sees_it, **OPTIONS).estimates()["sees_it"].mean == 1
    assert model.training


GROUPS = {
    "free": lambda measure: measure.cost == "free",
    "paper": lambda measure: measure.paper,
    "cheap": lambda measure: measure.cost != "costly",
    "weights": lambda measure: measure.cost == "weights",
    "all": lambda measure: True,
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_taken_of_a_network_but_for_what_is_left_out_by_name(group: str) -> None:
    model, x, y = fitted(1e-2)
    c = fm.measure(model, (x, y), measures=group, **{**OPTIONS, "trials": 1})
    always = {name for name, measure in CATALOGUE.items() if measure.paper and measure.cost == "free"}
    chosen = {name for name, measure in CATALOGUE.items() if GROUPS[group](measure)}
    assert set(c.estimates()) | set(c.settings.left_out) == always | chosen
    assert set(c.estimates()).isdisjoint(c.settings.left_out)
    assert [name for name in CATALOGUE if name in c.estimates()] == list(c.estimates())
    caption = " ".join(str(c).split())
    for name, reason in c.settings.left_out.items():
        assert f"no {CATALOGUE[name].label.strip()}: {reason}" in caption


def test_the_caption_says_why_a_measure_of_a_group_is_left_out_and_a_name_is_an_error() -> None:
    model, x, y = fitted(1e-2)
    c = fm.measure(model, (x, y), measures=["free", "margin"], fisher="model", **OPTIONS)
    assert "no coherence: it is one of samples' own gradients" in " ".join(str(c).split())
    assert "ggn_eigenvalue" in c.estimates()
    with pytest.raises(UndefinedMeasureError, match="coherence is not defined here"):
        fm.measure(model, (x, y), measures=["free", "coherence"], fisher="model", **OPTIONS)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_measure_of_the_catalogue_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    measure = CATALOGUE[name]
    assert measure.label
    assert measure.source
    assert measure.function.__doc__


NOTES = Path(__file__).parents[2] / "docs" / "reference" / "measures.md"


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_notes_have_a_line_for_every_measure_with_its_cost_and_direction(name: str) -> None:
    measure = CATALOGUE[name]
    lines = [line for line in NOTES.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    assert len(lines) == 1
    cost, better = (cell.strip() for cell in lines[0].split(" | ")[2:4])
    assert cost.split()[0] == measure.cost
    assert better == ("larger" if measure.larger_is_better else "smaller")
