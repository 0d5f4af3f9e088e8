"""Results as people and programs take them: tables, frames, JSON, metrics, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from scipy import stats

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.measures.results import SCHEMA
from support.results import TRIALS, characterization, comparison


def similar() -> fm.Comparison:
    return comparison(
        plain=characterization(-600, 250, draw=1, shares=True),
        regularized=characterization(-601, 200, draw=2, shares=True),
    )


def unequal(**options: Any) -> fm.Comparison:
    """The one of lower loss has the lower γ̂, and the other is lower without the residual."""
    return comparison(
        early=characterization(-500, 200, draw=1, train_loss=1e-2, **options),
        late=characterization(-900, 250, draw=2, train_loss=1e-4, **options),
    )


# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------


def test_json_comes_back_with_its_schema() -> None:
    c, both = characterization(shares=True), similar()
    assert fm.Characterization.from_json(c.to_json()) == c
    assert fm.Comparison.from_json(both.to_json()) == both
    for text in (c.to_json(), both.to_json()):
        assert json.loads(text)["schema"] == SCHEMA


def test_json_without_a_schema_is_that_of_an_earlier_version() -> None:
    for read, result in ((fm.Characterization.from_json, characterization()), (fm.Comparison.from_json, similar())):
        values = json.loads(result.to_json())
        del values["schema"]
        assert read(json.dumps(values)) == result


def test_json_of_a_later_version_is_refused_in_a_line() -> None:
    for read, result in ((fm.Characterization.from_json, characterization()), (fm.Comparison.from_json, similar())):
        later = json.dumps({**json.loads(result.to_json()), "schema": SCHEMA + 1})
        with pytest.raises(FlatminimaError, match=rf"schema {SCHEMA + 1}.*reads up to {SCHEMA}: install a newer"):
            read(later)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"characterizations": {}}', '{"characterizations": {"a": 1}}'])
def test_other_json_is_no_comparison(text: str) -> None:
    with pytest.raises(FlatminimaError, match="not a comparison") as error:
        fm.Comparison.from_json(text)
    assert "\n" not in str(error.value)


def test_what_the_command_line_adds_to_json_is_no_hindrance() -> None:
    c, both = characterization(), similar()
    assert fm.Characterization.from_json(json.dumps({**json.loads(c.to_json()), "normalization": {}})) == c
    assert fm.Comparison.from_json(json.dumps({**json.loads(both.to_json()), "normalizations": {}})) == both


# ---------------------------------------------------------------------------------------------------------------------
# Numbers for programs
# ---------------------------------------------------------------------------------------------------------------------


def test_metrics_are_finite_numbers_by_name() -> None:
    c = characterization(accuracy=None)
    assert fm.Estimate.of([1.0, math.inf, math.nan, 2.0]).mean == math.inf
    assert math.isnan(fm.Estimate.of([1.0, math.inf, 2.0]).standard_error)
    c = dataclasses.replace(c, others={"single": fm.Estimate.of([1.5]), "none": fm.Estimate.of([math.nan])})
    metrics = c.to_metrics("flatness/")
    assert metrics["flatness/log_det_fisher"] == c.log_det_fisher.mean
    assert metrics["flatness/log_det_fisher_standard_error"] == c.log_det_fisher.standard_error
    assert metrics["flatness/train_loss"] == c.train_loss
    assert metrics["flatness/single"] == 1.5
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    missing = {"single_standard_error", "none", "none_standard_error", "train_accuracy"}
    assert missing.isdisjoint(name.removeprefix("flatness/") for name in metrics)
    assert similar().to_metrics()["regularized/residual"] == similar()["regularized"].residual.mean


def test_a_frame_has_every_number_unrounded() -> None:
    c = characterization()
    frame = c.to_frame()
    assert frame.loc["log_det_fisher"].tolist() == [c.log_det_fisher.mean, c.log_det_fisher.standard_error]
    assert set(frame.index) == {*c.estimates(), "train_loss", "train_accuracy"}
    both = similar()
    frame = both.to_frame()
    difference = both.difference("plain", "regularized")
    row = frame.loc[("plain", "log_det_fisher")]
    assert row["rank"] == 2
    assert row["difference"] == difference.mean
    assert row["difference_standard_error"] == difference.standard_error
    assert math.isnan(frame.loc[("regularized", "log_det_fisher"), "difference"])
    wide = frame["mean"].unstack()
    assert wide.loc["plain", "fisher_trace"] == both["plain"].fisher_trace.mean


def test_without_its_package_a_frame_and_a_picture_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, extra, make in (
        ("pandas", "protocols", similar().to_frame),
        ("scipy.stats", "plot", similar().findings),
    ):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(
            FlatminimaError, match=rf"needs {package.split('.')[0]}: pip install 'flatminima\[{extra}\]'"
        ):
            make()


def test_an_interval_is_students() -> None:
    values = np.random.default_rng(3).normal(size=6).tolist()
    estimate = fm.Estimate.of([*values, math.nan])
    expected = stats.t.interval(0.9, 5, loc=statistics.fmean(values), scale=stats.sem(values))
    assert estimate.interval(0.9) == pytest.approx(expected, rel=1e-12)
    assert all(map(math.isnan, fm.Estimate.of([1.0]).interval()))
    with pytest.raises(FlatminimaError, match="between 0 and 1"):
        estimate.interval(95)


def test_a_minimum_is_found_by_name_and_a_wrong_name_hinted_at() -> None:
    both = similar()
    assert both["plain"] is both.characterizations["plain"]
    assert (list(both), len(both), "plain" in both, "plane" in both) == (["plain", "regularized"], 2, True, False)
    with pytest.raises(FlatminimaError, match=r"no model named 'plane' \(did you mean 'plain'\?\): choose from plain"):
        both["plane"]


def test_modules_shares_add_up_and_are_joined_under_their_parents() -> None:
    c = characterization(shares=True)
    assert c.shares_by_module() == {"body.0": 0.75, "body.1": 0.125, "head": 0.125}
    assert c.shares_by_module(2) == {"body": 0.875, "head": 0.125}
    assert c.shares_by_module(1) == {"body": 0.875, "head": 0.125}  # there is no more to join
    with pytest.raises(FlatminimaError, match="per_parameter=True"):
        characterization().shares_by_module()


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------


def test_at_similar_losses_the_best_is_that_of_the_lowest_gamma() -> None:
    both = similar()
    assert (both.decisive, both.best, both.reference, both.caveats()) == ("log_det_fisher", *["regularized"] * 2, [])
    assert "differences to 'regularized', the best by γ̂" in str(both)
    said = " ".join(both.findings())
    difference = both.difference("plain", "regularized")
    low, high = difference.interval()
    assert low > 0
    assert f"plain is higher by {difference} (95 % interval {low:.3g} to {high:.3g})" in said
    assert f"lower in 0 of {TRIALS} trials: the difference is clear" in said


def test_minima_that_noise_separates_are_not_clearly_apart() -> None:
    both = comparison(a=characterization(draw=1), b=characterization(draw=2))
    low, high = both.difference("a", "b").interval()
    assert low < 0 < high
    assert "they are not clearly apart" in " ".join(both.findings())


def test_at_unequal_losses_none_is_called_the_best_by_gamma() -> None:
    both = unequal()
    assert both.ranks() == {"late": 1, "early": 2}
    assert (both.decisive, both.best) == ("log_det_unit_fisher", "early")
    text = " ".join(str(both).split())
    assert "differences to 'early', the lowest in γ̂ at unit residuals" in text
    assert "the best by" not in text
    assert "Training losses differ (late 0.0001, early 0.01)" in text
    assert "read γ̂ at unit residuals" in text
    said = " ".join(both.findings())
    residual = both.difference("late", "early", "residual").mean
    assert f"{residual:+.1f} is residual" in said
    assert "train all to one loss" in said


def test_normalized_logits_make_unequal_losses_comparable() -> None:
    both = unequal(logit_normalization=0.04)
    assert (both.decisive, both.best, both.caveats()) == ("log_det_fisher", "late", [])
    assert "logits divided by 0.04 times their norm" in " ".join(str(both).split())


def test_with_batch_statistics_unequal_losses_leave_nothing_to_say() -> None:
    parts = ("residual", "sensitivity", "diversity", "log_det_unit_fisher")
    minima = unequal(batchnorm=10).characterizations
    both = comparison(**{name: dataclasses.replace(c, **dict.fromkeys(parts)) for name, c in minima.items()})
    assert (both.decisive, both.best, both.reference) == (None, None, "early")
    assert "logit_normalization=0.04" in " ".join(both.caveats())
    assert both.findings()[-1] == "No minimum can be called the best."
    assert "BatchNorm by chunks of 10" in " ".join(str(both).split())


def test_between_kinds_of_models_and_unfitted_ones_none_is_the_best() -> None:
    kinds = comparison(small=characterization(), large=characterization(-700, parameters=2000))
    assert kinds.best is None
    assert "differ in kind (small 1,000 and large 2,000 parameters)" in str(kinds)
    unfitted = comparison(a=characterization(train_loss=0.2, accuracy=0.9), b=characterization(draw=1, train_loss=0.2))
    assert unfitted.best is None
    assert "a has not fitted its training data (accuracy 90.0%)" in " ".join(str(unfitted).split())


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def test_captions_say_every_setting() -> None:
    settings = {
        "subset_size": 17,
        "trials": 23,
        "seed": 29,
        "loss": "MyLoss",
        "loss_form": "MyForm(gamma=2.0) {'gamma': 2.0}",
        "fisher": "labels",
        "batchnorm": 10,
        "logit_normalization": 0.04,
        "scale_invariant": True,
        "robustness_samples": 13,
        "generic_parameters": ["a", "b"],
        "dtype": "float64",
        "device": "cuda:3",
        "torch_version": "2.7.8",
        "flatminima_version": "4.5.6",
        "left_out": {"margin": "there are no classes"},
    }
    c = characterization(**settings)
    assert {*settings, "larger_is_better"} == {entry.name for entry in dataclasses.fields(c.settings)}
    one = dataclasses.replace(c, singular_trials=(1, 2))
    for text in (str(one), str(comparison(a=one, b=one)), one.to_markdown(), comparison(a=one, b=one)._repr_html_()):
        caption = " ".join(text.split()).replace("\\", "")
        for phrase in (
            "23 subsets of 17 from 500 samples, seed 29",
            "2 of them singular",
            "loss MyLoss, MyForm(gamma=2.0)",
            "BatchNorm by chunks of 10",
            "exact Fisher by labels",
            "logits divided by 0.04 times their norm",
            "scale-invariant",
            "robustness of 13 samples a subset",
            "2 parameters sample by sample",
            "float64 on cuda:3",
            "flatminima 4.5.6, PyTorch 2.7.8",
            "no margin (10th percentile): there are no classes",
        ):
            assert phrase in caption


def test_a_setting_that_differs_is_said_by_name() -> None:
    both = comparison(a=characterization(trials=8), b=characterization(trials=5))
    caption = " ".join(str(both).split())
    assert "a: 8 subsets of 20 from 500 samples, seed 0; b: 5 subsets of 20" in caption
    assert caption.count("loss cross_entropy") == 1


@pytest.mark.parametrize("result", [characterization(shares=True), similar(), unequal()], ids=["one", "two", "unequal"])
def test_tables_fit_eighty_columns(result: Any) -> None:
    lines = str(result).splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert "…" not in str(result)


def test_shares_are_printed_where_they_were_measured() -> None:
    assert "Shares by parameter" in str(characterization(shares=True))
    assert "body.0.weight" in str(characterization(shares=True))
    assert "Shares by parameter" not in str(characterization())
    assert re.search(r"body.0\W+75.0%\W+75.0%", str(similar()))


def test_tables_for_papers_round_value_and_error_together_and_take_the_measures_asked_for() -> None:
    both = similar()
    text = both.to_markdown(["log_det_fisher", "fisher_trace"])
    gamma, difference = both["plain"].log_det_fisher, both.difference("plain", "regularized")
    assert f"| {gamma} |" in text
    assert f"| paired difference | +{difference} |  |" in text
    assert "differences to regularized**" in text
    assert "residual" not in text
    assert "difference" not in both.to_markdown("log_det_fisher", differences=False)
    assert rf"${str(gamma).replace('±', chr(92) + 'pm')}$" in both.to_latex()
    assert r"\label{tab:a}" in both["plain"].to_latex(["log_det_fisher"], label="tab:a")
    with pytest.raises(FlatminimaError, match=r"no measure 'fisher_trac' \(did you mean 'fisher_trace'\?\)"):
        both.to_latex(["fisher_trac"])
    with pytest.raises(FlatminimaError, match="no measure 'margin'"):
        both["plain"].to_markdown(["margin"])


def test_a_short_repr_says_what_it_is() -> None:
    both = similar()
    assert len(repr(both["plain"])) < 200
    assert str(both["plain"].log_det_fisher) in repr(both["plain"])
    assert repr(both).startswith("<Comparison of 2 minima: plain: γ̂ = ")
    assert repr(both["plain"].fisher_trace) == f"Estimate({both['plain'].fisher_trace}, {TRIALS} trials)"


def test_notebooks_show_names_as_text() -> None:
    both = comparison(**{"<i>a</i>": characterization(), "b": characterization(draw=1)})
    page = both._repr_html_()
    assert "&lt;i&gt;a&lt;/i&gt;" in page
    assert "<i>" not in page
    assert "<table>" in both["b"]._repr_html_()


def test_estimates_without_an_error_are_equal_on_every_python() -> None:
    single, none = fm.Estimate.of([1.5]), fm.Estimate.of([math.nan])
    assert single == fm.Estimate.of([1.5])
    assert hash(single) == hash(fm.Estimate.of([1.5]))
    assert none == fm.Estimate.of([math.nan])
    assert single not in (fm.Estimate.of([1.6]), none, 1.5)
