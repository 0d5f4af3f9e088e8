from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flatminima as fm
from flatminima.errors import (
    FlatminimaError,
    FlatminimaWarning,
    NotAMinimumWarning,
    UndefinedMeasureError,
    UnequalLossWarning,
)
from flatminima.lab.data import load_data
from flatminima.lab.errors import DamagedRunWarning, UnkeptMeasuresWarning
from flatminima.lab.runs import measuring
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.measuring import (
    Measuring,
    compare_images,
    compare_loaded,
    compare_runs,
    measure_images,
    measure_run,
)
from flatminima.lab.runs.networks import load_networks
from flatminima.lab.runs.session import Session
from flatminima.lab.runs.sets import load_run, load_sets
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.runs.training import launch, train
from flatminima.measures import PlainOptions

SPEC = RunSpec(
    model="mlp", data="digits", train_size=150, augmentation="no-aug", batch_size=50, epochs=40, lr=0.05, nesterov=True
)
HOW = Measuring(subset_size=10, trials=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Minima of the same clean images, one of other images, and a network that is far from any minimum."""
    root = tmp_path_factory.mktemp("runs")
    for spec in specs().values():
        train(spec, root, progress=False)
    return root


def specs() -> dict[str, RunSpec]:
    return {
        "plain": SPEC,
        "confused": replace(SPEC, confusion=30),
        "others": replace(SPEC, seed=1),
        "unfit": replace(SPEC, epochs=1, lr=1e-4),
    }


@pytest.fixture
def paths(root: Path) -> dict[str, Path]:
    found = {name: RunFolder.of(root, spec).path for name, spec in specs().items()}
    for path in found.values():
        (path / "measures.json").unlink(missing_ok=True)
    return found


def refuse_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise FlatminimaError("measured again")

    monkeypatch.setattr(measuring, "measure", refuse)


def test_a_run_of_a_read_only_folder_is_measured_and_left(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "is_writable", False)
    before = sorted(paths["plain"].iterdir())
    with pytest.warns(UnkeptMeasuresWarning, match="not kept there: it is read-only"):
        found = measure_run(paths["plain"], HOW, progress=False)
    assert sorted(paths["plain"].iterdir()) == before
    monkeypatch.undo()
    assert measure_run(paths["plain"], HOW, progress=False).log_det_fisher == found.log_det_fisher


def test_a_folder_whose_lock_is_anothers_is_not_writable(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(paths["plain"]).lock():
        pass
    assert RunFolder(paths["plain"]).is_writable
    monkeypatch.setattr("os.access", lambda path, mode: path.name != "lock")
    assert not RunFolder(paths["plain"]).is_writable


def test_a_run_is_measured_on_its_clean_images(paths: dict[str, Path]) -> None:
    found = measure_run(paths["confused"], HOW, progress=False)
    _, model, clean, _ = load_run(paths["confused"])
    expected = fm.measure(model, clean, subset_size=10, trials=3, progress=False)
    assert found.log_det_fisher == expected.log_det_fisher
    assert (found.num_samples, found.train_loss) == (150, expected.train_loss)


@pytest.mark.parametrize("measures", [("weights",), ("distance_from_initialization",)])
def test_how_far_a_run_has_moved_the_weights_is_among_its_measures(
    paths: dict[str, Path], measures: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is built again from the seed as it was before the first update."""
    run = Session(specs()["plain"], load_sets(specs()["plain"]), launch(specs()["plain"], "cpu"))
    expected = sum(
        (after - before).double().square().sum().item()
        for before, after in zip(run.network.parameters(), load_run(paths["plain"])[1].parameters(), strict=True)
    )
    torch.manual_seed(123)
    state = torch.get_rng_state()
    found = measure_run(paths["plain"], replace(HOW, measures=measures), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.estimates()["distance_from_initialization"].mean == pytest.approx(expected, rel=1e-6)
    refuse_to_measure(monkeypatch)
    assert measure_run(paths["plain"], replace(HOW, measures=measures), progress=False) == found


def test_distances_missing_in_what_was_kept_before_are_taken(paths: dict[str, Path]) -> None:
    how = replace(HOW, measures=("weights",))
    measure_run(paths["plain"], how, progress=False)
    kept = json.loads((paths["plain"] / "measures.json").read_text())
    del kept[0]["asked"]["initial"]
    del kept[0]["characterization"]["others"]["distance_from_initialization"]
    (paths["plain"] / "measures.json").write_text(json.dumps(kept))
    again = measure_run(paths["plain"], how, progress=False)
    assert "distance_from_initialization" in again.estimates()


def test_measures_are_kept_for_every_way_of_measuring(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [HOW, replace(HOW, seed=1), replace(HOW, double=True), replace(HOW, fisher="model", subset_size=5)]
    first = [measure_run(paths["plain"], how, progress=False) for how in ways]
    assert len({c.log_det_fisher.mean for c in first}) == 4
    assert [c.settings.dtype for c in first] == ["float32", "float32", "float64", "float32"]
    assert [c.settings.fisher for c in first] == [*["empirical"] * 3, "model"]
    assert first[2].log_det_fisher.mean == pytest.approx(first[0].log_det_fisher.mean, abs=1e-2)
    refuse_to_measure(monkeypatch)
    assert [measure_run(paths["plain"], how, progress=False) for how in ways] == first
    assert measure_run(paths["plain"], replace(HOW, memory_gib=1.5), progress=False) == first[0]
    with pytest.raises(FlatminimaError, match="measured again"):
        measure_run(paths["plain"], replace(HOW, trials=4), progress=False)


def test_other_weights_or_another_version_are_measured_again(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(paths["plain"], path)
    measure_run(path, HOW, progress=False)
    refuse_to_measure(monkeypatch)
    measure_run(path, HOW, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "99")
        with pytest.raises(FlatminimaError, match="measured again"):
            measure_run(path, HOW, progress=False)
    (path / "checkpoint.safetensors").write_bytes((paths["confused"] / "checkpoint.safetensors").read_bytes())
    with pytest.raises(FlatminimaError, match="measured again"):
        measure_run(path, HOW, progress=False)


def test_kept_measures_warn_as_they_did_when_taken(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(NotAMinimumWarning) as first:
        measure_run(paths["unfit"], HOW, progress=False)
    refuse_to_measure(monkeypatch)
    with pytest.warns(NotAMinimumWarning) as again:
        measure_run(paths["unfit"], HOW, progress=False)
    assert [str(w.message) for w in first] == [str(w.message) for w in again]


@pytest.mark.parametrize(
    "content", ["", "{", "3", "[3]", '{"old": 1}', '[{"asked": {}}]', '[{"asked": {}, "warnings": 1}]']
)
def test_damaged_measures_are_taken_again(content: str, paths: dict[str, Path]) -> None:
    expected = measure_run(paths["plain"], HOW, progress=False)
    kept = paths["plain"] / "measures.json"
    kept.write_text(content)
    if content:
        with pytest.warns(DamagedRunWarning, match="measured again"):
            assert measure_run(paths["plain"], HOW, progress=False) == expected
    else:
        assert measure_run(paths["plain"], HOW, progress=False) == expected
    assert len(json.loads(kept.read_text())) == 1


def test_what_cannot_be_measured_is_named(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="not a run folder"):
        measure_run(tmp_path, HOW)
    RunFolder(tmp_path).write_spec(SPEC)
    with pytest.raises(FlatminimaError, match="is not finished"):
        measure_run(tmp_path, HOW)
    with pytest.raises(FlatminimaError, match="fewer than subset_size"):
        measure_run(paths["plain"], replace(HOW, subset_size=151), progress=False)
    assert not (paths["plain"] / "measures.json").exists()


@pytest.mark.filterwarnings("ignore::flatminima.errors.UnequalLossWarning")
def test_runs_are_compared_on_the_same_subsets(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {name: paths[name] for name in ("plain", "confused")}
    comparison = compare_runs(pair, HOW, progress=False)
    models = {name: load_run(path)[1] for name, path in pair.items()}
    expected = fm.compare(models, load_run(paths["plain"])[2], subset_size=10, trials=3, progress=False)
    assert comparison == expected
    refuse_to_measure(monkeypatch)
    assert compare_runs(pair, HOW, progress=False) == comparison


@pytest.mark.filterwarnings("ignore::flatminima.errors.UnequalLossWarning")
def test_runs_are_measured_together_until_their_differences_are_known(paths: dict[str, Path]) -> None:
    how = replace(HOW, trials=20, measures=(), max_standard_error=1e9)
    pair = {name: paths[name] for name in ("plain", "confused")}
    comparison = compare_runs(pair, how, progress=False)
    assert [c.settings.trials for c in comparison.characterizations.values()] == [5, 5]
    models = {name: load_run(path)[1] for name, path in pair.items()}
    clean = load_run(paths["plain"])[2]
    expected = fm.compare(models, clean, subset_size=10, trials=5, measures=(), progress=False)
    assert comparison == expected
    assert not (paths["plain"] / "measures.json").exists()


@pytest.mark.filterwarnings("ignore::flatminima.errors.UnequalLossWarning")
def test_several_measured_at_once_are_what_one_process_measures(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {name: paths[name] for name in ("plain", "unfit")}
    (pair["plain"] / "measures.json").write_text("damaged")
    with monkeypatch.context() as here:
        refuse_to_measure(here)  # what the workers have not measured
        with pytest.warns(FlatminimaWarning) as caught:
            comparison = compare_runs(pair, HOW, workers=2, progress=False)
    said = [(w.category, str(w.message).split(":")[0]) for w in caught]
    assert said.count((NotAMinimumWarning, "unfit")) == said.count((DamagedRunWarning, "plain")) == 1
    for path in pair.values():
        (path / "measures.json").unlink()
    with pytest.warns(NotAMinimumWarning):
        assert compare_runs(pair, HOW, progress=False) == comparison


def test_of_several_measured_at_once_an_error_names_its_run_and_keeps_its_class(paths: dict[str, Path]) -> None:
    pair = {name: paths[name] for name in ("plain", "confused")}
    with pytest.raises(FlatminimaError, match=r"^plain: .*memory budget"):
        compare_runs(pair, replace(HOW, memory_gib=1e-6), workers=2, progress=False)
    with pytest.raises(UndefinedMeasureError, match=r"^plain: "):
        compare_runs(pair, replace(HOW, measures=("coherence",), fisher="model"), workers=2, progress=False)
    with pytest.raises(FlatminimaError, match="workers must be 1 or more"):
        compare_runs(pair, HOW, workers=0, progress=False)
    with pytest.raises(FlatminimaError, match="leave workers out"):
        compare_runs(pair, replace(HOW, max_standard_error=0.1), workers=2, progress=False)


def test_networks_of_two_types_compare_in_float64_alone(paths: dict[str, Path]) -> None:
    _, model, clean, _ = load_run(paths["plain"])
    models = {"single": model, "double": copy.deepcopy(model).double()}
    with pytest.raises(FlatminimaError, match=r"single: torch.float32, double: torch.float64.*in float64"):
        compare_images(models, clean, HOW, device="cpu", progress=False)
    comparison = compare_images(models, clean, replace(HOW, double=True), device="cpu", progress=False)
    assert comparison.difference("single", "double").mean == 0


def test_runs_of_different_images_are_refused_before_anything_is_measured(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_measure(monkeypatch)
    with pytest.raises(FlatminimaError, match="others and plain were trained on different images"):
        compare_runs({name: paths[name] for name in ("plain", "others")}, HOW, progress=False)
    with pytest.raises(FlatminimaError, match="at least two minima, got 1"):
        compare_runs({"plain": paths["plain"]}, HOW, progress=False)
    with pytest.raises(FlatminimaError, match=r"^plain: measured again"):
        compare_runs({name: paths[name] for name in ("plain", "confused")}, HOW, progress=False)


def test_runs_of_different_images_compare_on_named_data(paths: dict[str, Path]) -> None:
    networks = load_networks({name: paths[name] for name in ("others", "unfit")}, load_data("digits")[0], None)
    with pytest.warns(FlatminimaWarning) as caught:
        comparison = compare_loaded(networks, HOW, progress=False)
    said = {(w.category, str(w.message).split(":")[0]) for w in caught}
    assert {(NotAMinimumWarning, "others"), (NotAMinimumWarning, "unfit")} < said
    assert UnequalLossWarning in {category for category, _ in said}
    assert {c.num_samples for c in comparison.characterizations.values()} == {1297}
    assert comparison.ranks()["others"] == 1


def test_a_budget_of_memory_is_kept_to(paths: dict[str, Path]) -> None:
    _, model, clean, _ = load_run(paths["plain"])
    with pytest.raises(FlatminimaError, match=r"(?i)memory"):
        measure_images(model, clean, replace(HOW, memory_gib=1e-6), progress=False)


def test_float64_is_refused_on_a_device_without_it(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, clean, _ = load_run(paths["plain"])
    monkeypatch.setattr("flatminima.network.precision.WITHOUT_FLOAT64", {"meta"})
    with pytest.raises(FlatminimaError, match="'meta' has no float64"):
        measure_images(model, clean, replace(HOW, double=True), device="meta", progress=False)


def test_measuring_in_float64_converts_the_images_batch_by_batch(paths: dict[str, Path]) -> None:
    _, model, clean, _ = load_run(paths["plain"])
    assert (
        measure_images(model, clean, replace(HOW, double=True), device="cpu", progress=False).settings.dtype
        == "float64"
    )
    assert next(model.parameters()).dtype == torch.float64


def test_the_lab_measures_by_the_librarys_defaults() -> None:
    defaults = asdict(PlainOptions())
    assert {name: value for name, value in asdict(Measuring()).items() if name in defaults} == defaults
