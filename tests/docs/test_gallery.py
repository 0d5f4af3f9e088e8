"""Programs of the gallery, in small; those of the trainers are run in ``tests/integrations``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatminima.gramian.rules import temporary_rules
from support.gallery import EXAMPLES, run_example

pytestmark = pytest.mark.xdist_group("gallery")  # one import of matplotlib and scikit-learn

TESTED_ELSEWHERE = {"train_like_timm", "train_with_accelerate", "train_with_lightning", "train_with_transformers"}


@pytest.fixture(autouse=True)
def _own_rules() -> Iterator[None]:
    with temporary_rules():
        yield


def test_the_better_of_two_checkpoints_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_example("measure_and_compare", TRIALS=3, TARGET_LOSS=0.1)
    assert found["better"] == "first"
    errors = [float(error) for error in re.findall(r"test error ([\d.]+)%", capsys.readouterr().out)]
    assert errors[0] < errors[1]


def test_all_ways_of_training_under_label_noise_run() -> None:
    found = run_example("train_under_label_noise", EPOCHS=1, SEEDS=(0, 1))
    assert {arm: len(errors) for arm, errors in found["errors"].items()} == dict.fromkeys(found["arms"], 2)


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_a_followed_training_has_its_parts_every_other_epoch() -> None:
    found = run_example("follow_a_training", EPOCHS=4)
    assert [epoch.epoch for epoch in found["tracker"].epochs] == [2, 4]
    assert all({"residual", "sensitivity", "diversity"} <= set(epoch.measures) for epoch in found["tracker"].epochs)


def test_the_line_between_two_minima_ends_at_their_losses() -> None:
    found = run_example("look_around_minima", EPOCHS=4, STEPS=3)
    inputs, targets = found["train_set"]
    ends = [found["nn"].functional.cross_entropy(found[name](inputs), targets).item() for name in ("small", "large")]
    assert [float(found["between"].losses[place]) for place in (5, 15)] == pytest.approx(ends, rel=1e-5)
    assert found["steepest"].eigenvalues[0] > 0


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_own_measures_stand_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_example("write_your_own_measure", EPOCHS=5, TRIALS=2)
    assert {"largest_loss", "opposed_pairs", "noise_margin"} <= set(found["comparison"].measures())
    assert "opposed_pairs" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_the_rule_changes_no_number_and_ends_the_warning() -> None:
    found = run_example("write_a_rule", EPOCHS=8)
    assert found["after"].log_det_fisher.mean == pytest.approx(found["before"].log_det_fisher.mean, abs=1e-3)
    assert [str(w.message) for w in found["caught"] if "layer rule" in str(w.message)] == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="peft is installed from Python 3.11 on")
@pytest.mark.filterwarnings("ignore")
def test_adapters_are_measured_by_their_own_gradients() -> None:
    found = run_example("measure_adapters", PRETRAINING=2, EPOCHS=3, TRIALS=2)
    shares = found["comparison"].characterizations["plain"].shares
    assert {"lora" in name or "modules_to_save" in name for name in shares} == {True}


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_a_ledger_is_made_and_judged() -> None:
    found = run_example("judge_measures", WRONG_LABELS=(0, 100), SEEDS=(0, 1, 2), EPOCHS=2, TRIALS=2)
    assert len(found["table"]) == 6
    assert found["evaluation"].conclusions()


def test_every_program_of_the_gallery_is_tested_and_has_a_place() -> None:
    programs = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = Path(__file__).read_text(encoding="utf-8")
    assert {name for name in programs - TESTED_ELSEWHERE if f'run_example("{name}"' not in tests} == set()
    order = (EXAMPLES.parent / "docs" / "extensions" / "gallery_order.py").read_text(encoding="utf-8")
    assert sorted(re.findall(r'"(\w+)\.py"', order)) == sorted(programs)


def test_a_setting_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no constants EPOCHES"):
        run_example("train_under_label_noise", EPOCHES=1)
