from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.data.sources import load_data
from flatminima.lab.experiments import paper
from flatminima.lab.experiments.experiment import Experiment
from flatminima.lab.experiments.paper import (
    EXACT,
    EXPERIMENTS,
    MATCHED,
    PLAIN,
    REGULARIZED,
    SAM,
    Winners,
    build_experiment,
    registered,
)
from flatminima.lab.experiments.presets import (
    FISHER_PENALTY,
    GRADIENT_NORM,
    PRESETS,
    UNIT_RESIDUALS,
    Preset,
)
from flatminima.lab.names import PresetName
from flatminima.lab.runs.measuring import Measuring
from flatminima.lab.runs.schedules import MultiStep, OneCycle, Plateau
from flatminima.lab.runs.spec import (
    FisherPenaltySpec,
    GradientNormSpec,
    RegularizerSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)


def built(name: str, preset: PresetName = "paper", **options: object) -> Experiment:
    return build_experiment(name, PRESETS[preset], **{"chosen": {}, "data": None, "seeds": None, **options})  # type: ignore[arg-type]


RUNS = {"search": 672, "scenario-1": 30, "scenario-2": 20, "scenario-3": 20, "table-1": 175, "table-2": 30}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_papers_experiments_have_all_their_runs(name: str) -> None:
    tasks = built(name).tasks(Path("runs"))
    assert len(tasks) == RUNS[name]
    assert len({task.setting.spec.key for task in tasks}) == len(tasks)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_called_as_it_is_registered(name: str) -> None:
    assert built(name).name == name


def test_an_experiment_is_added_by_one_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERIMENTS, "batches", EXPERIMENTS["scenario-3"])  # so that the entry goes with the test

    @registered("batches")
    def batches(preset: Preset, chosen: Winners) -> Experiment:
        return replace(paper.scenario_3(preset, chosen), title="Batches")

    assert (built("batches").name, built("batches").title) == ("batches", "Batches")
    assert list(EXPERIMENTS)[-1] == "batches"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_preset_keeps_the_form(name: str, preset: PresetName) -> None:
    ours, papers = built(name, preset), built(name)
    assert ours.seeds == ((PRESETS[preset].search_seed,) if name == "search" else papers.seeds)
    assert ours.answers == papers.answers
    if ours.answers == "ranking":
        assert len(ours.cases) == len(papers.cases)
    if ours.answers == "comparison":
        assert ours.arms[: len(papers.arms)] == papers.arms


@pytest.mark.parametrize("name", ["scenario-1", "scenario-2", "scenario-3"])
def test_scenarios_train_as_the_paper_does(name: str) -> None:
    for setting in built(name).settings:
        spec = setting.spec
        assert (spec.model, spec.data, spec.lr, spec.epochs, spec.weight_decay) == (
            "resnet20",
            "cifar10",
            0.1,
            200,
            1e-4,
        )
        assert isinstance(spec.schedule, Plateau)
        assert spec.schedule.factor == 0.1
        assert spec.regularizer is None


def test_what_scenarios_vary_and_what_they_leave() -> None:
    one, two, three = (built(f"scenario-{number}").settings for number in (1, 2, 3))
    assert [s.spec.confusion for s in one] == [0, 1000, 2000, 3000, 4000, 5000]
    assert {(s.spec.train_size, s.spec.augmentation, s.spec.batch_size) for s in one} == {(10_000, "4-crop-f", 128)}
    assert [s.spec.augmentation for s in two] == ["no-aug", "flip-only", "1-crop-f", "4-crop-f"]
    assert {(s.spec.train_size, s.spec.confusion, s.spec.batch_size) for s in two} == {(None, 0, 128)}
    assert [s.spec.batch_size for s in three] == [128, 256, 512, 1024]
    assert {(s.spec.train_size, s.spec.confusion, s.spec.augmentation) for s in three} == {(None, 0, "4-crop-f")}
    assert built("scenario-1").measuring == Measuring(
        subset_size=100, trials=100, robustness_samples=100, on_singular="skip"
    )


def test_table_1_has_the_papers_recipes_and_the_fair_comparisons() -> None:
    table = built("table-1")
    specs = {(s.case, s.arm): s.spec for s in table.settings}
    cnn = specs["CNN, CIFAR-10", PLAIN]
    assert (cnn.lr, cnn.epochs, cnn.batch_size, cnn.nesterov) == (0.01, 200, 128, True)
    assert cnn.schedule == MultiStep((0.5, 0.75))
    assert specs["ResNet, CIFAR-10", PLAIN].iterations == 64_000
    assert specs["ResNet, CIFAR-10", MATCHED].iterations == 192_000
    assert specs["DenseNet, CIFAR-100", PLAIN].data == "cifar100"
    for case in table.cases:
        plain = specs[case, PLAIN]
        regularized = specs[case, REGULARIZED].regularizer
        assert isinstance(regularized, RegularizerSpec)
        assert (regularized.alpha, regularized.estimator, regularized.main_gradient) == (
            1e-4,
            "finite-difference",
            "whole-batch",
        )
        assert specs[case, EXACT] == replace(plain, regularizer=replace(regularized, estimator="hvp"))
        assert specs[case, SAM] == replace(plain, regularizer=SharpnessAwareSpec())
        assert (table.published[case, PLAIN][0], table.published[case, REGULARIZED][0]) != (None, None)
    assert "ResNet, CIFAR-100" not in table.cases


@pytest.mark.parametrize("preset", ["small", "digits"])
def test_table_1_has_further_rivals_where_they_are_affordable(preset: PresetName) -> None:
    table = built("table-1", preset)
    kinds = {GRADIENT_NORM: GradientNormSpec, FISHER_PENALTY: FisherPenaltySpec, UNIT_RESIDUALS: UnitResidualSpec}
    assert table.arms[5:] == ["+reg, every=10", *kinds]
    specs = {(s.case, s.arm): s.spec for s in table.settings}
    for case in table.cases:
        for arm, kind in kinds.items():
            spec = specs[case, arm]
            assert isinstance(spec.regularizer, kind)
            assert replace(spec, regularizer=None) == specs[case, PLAIN]
    assert "Fisher penalty" in table.question
    assert "Fisher penalty" not in built("table-1").question


def test_medium_is_the_papers_scenario_1_on_a_smaller_network() -> None:
    one, papers = built("scenario-1", "medium"), built("scenario-1")
    assert [(s.spec.train_size, s.spec.confusion) for s in one.settings] == [
        (s.spec.train_size, s.spec.confusion) for s in papers.settings
    ]
    assert {s.spec.data for s in one.settings} == {"cifar10"}
    assert isinstance(one.settings[0].spec.schedule, OneCycle)
    assert one.measuring is not None
    assert "cheap" in one.measuring.measures


def test_mediums_tables_are_at_three_rates_of_label_noise_on_as_many_images() -> None:
    one, two = built("table-1", "medium"), built("table-2", "medium")
    *plain, fitted = [s.spec for s in one.settings if s.arm == PLAIN]
    assert [(spec.train_size, spec.confusion) for spec in plain] == [(10_000, 0), (9000, 1000), (8000, 2000)]
    assert [replace(spec, train_size=10_000, confusion=0) for spec in plain] == [plain[0]] * 3
    assert (fitted.train_size, fitted.confusion, fitted.epochs) == (8000, 2000, plain[0].epochs)
    assert fitted.augmentation == "no-aug"  # there as many epochs fit wrong labels, too
    assert two.cases == one.cases
    assert one.arms == [PLAIN, REGULARIZED, EXACT, SAM, MATCHED, "+reg, every=10"]
    regularizers = {(s.case, s.arm): s.spec.regularizer for s in one.settings}
    for case in one.cases:
        every = regularizers[case, "+reg, every=10"]
        assert isinstance(every, RegularizerSpec)
        assert every.every == 10
        assert replace(every, every=1) == regularizers[case, REGULARIZED]


def test_mediums_search_is_on_a_seed_that_no_table_has() -> None:
    search = built("search", "medium")
    assert search.seeds == (100,)
    assert not set(search.seeds) & set(built("table-1", "medium").seeds)


def test_table_2_measures_runs_of_table_1() -> None:
    one, two = (built(name) for name in ("table-1", "table-2"))
    assert {s.spec for s in two.settings} < {s.spec for s in one.settings}
    assert set(two.published) == {(s.case, s.arm) for s in two.settings}


def test_the_search_is_the_papers_grid_on_held_out_images() -> None:
    settings = [s for s in built("search").settings if s.case == "WRN, CIFAR-100"]
    regularizers = [s.spec.regularizer for s in settings]
    found = {(r.beta, r.num_sub_batches, r.max_grad_norm) for r in regularizers if isinstance(r, RegularizerSpec)}
    betas = {10, 20, 30, 40, 50, 75, 100, 125}
    assert found == {(beta, m, tau) for beta in betas for m in (4, 8, 16) for tau in (1, 5, 10, 15)}
    assert {s.spec.validation for s in settings} == {5000}


def test_the_searchs_winner_goes_to_the_tables() -> None:
    winner = RegularizerSpec(beta=75, num_sub_batches=16, max_grad_norm=15)
    table = built("table-1", chosen={"CNN, CIFAR-10": winner})
    specs = {(s.case, s.arm): s.spec for s in table.settings}
    assert specs["CNN, CIFAR-10", REGULARIZED].regularizer == winner
    assert specs["WRN, CIFAR-10", REGULARIZED].regularizer != winner
    assert "those of CNN, CIFAR-10 are the search's" in table.question
    assert "a guess" in built("table-1").question


def test_data_are_looked_for_in_the_folder_given(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="neither a folder cifar10 nor train"):
        built("scenario-1", data=tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert built("scenario-1", data=tmp_path).settings[0].spec.source == str(tmp_path / "cifar10")
    assert built("scenario-1", "digits", data=tmp_path).settings[0].spec.source == "digits"
    with pytest.raises(FlatminimaError, match="cifar100"):
        built("table-1", data=tmp_path)


def test_seeds_that_are_named_twice_are_refused() -> None:
    with pytest.raises(FlatminimaError, match="seeds named more than once: 0, 2"):
        replace(built("scenario-1"), seeds=(2, 0, 0, 1, 2))


def test_settings_that_are_one_run_are_refused() -> None:
    scenario = built("scenario-1")
    twice = (*scenario.settings, replace(scenario.settings[0], case="again"))
    with pytest.raises(FlatminimaError, match="'plain', '0' and 'plain', 'again' are the same run"):
        replace(scenario, settings=twice)


def test_a_folder_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train-0.parquet").touch()
    monkeypatch.setattr(paper, "load_data", lambda source: load_data("digits"))  # ten classes too
    assert built("scenario-1", data=tmp_path).settings[0].spec.source == str(tmp_path)
    with pytest.raises(FlatminimaError, match="has 10 classes, not cifar100's 100"):
        built("table-1", data=tmp_path)
