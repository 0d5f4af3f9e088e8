"""The number in a checkpoint's name, and the run that it is of."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.runs import in_order, said_order


@pytest.mark.parametrize(
    ("name", "run", "unit", "number"),
    [
        ("a/checkpoint-500/", "a", "step", 500),
        ("a/epoch=3-step=120.ckpt", "a", "step", 120),
        ("a/epoch_12.pth.tar", "a", "epoch", 12),
        ("a/resnet20-epoch-7-acc91.pt", "a", "epoch", 7),
        ("a/resnet20_iter0009000.pt", "a", "step", 9000),
        ("a/model-5.safetensors", "a", "number", 5),
        ("a/resnet20-5.pt", "a", "number", 5),
        ("a/epoch-4/model.pt", "a", "epoch", 4),
        ("a/3/weights.pt", "a", "number", 3),
        ("a/epoch-4/weights/model.pt", "a", "epoch", 4),
        ("17=a/best.pt", "a", "number", 17),
    ],
)
def test_a_name_says_the_number_and_what_it_counts(
    name: str, run: str, unit: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name.partition("=")[2] if name.startswith("17=") else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith("/") else path.touch()
    (found,) = in_order([name])
    assert (found.path, found.run, found.unit, found.number) == (path, run, unit, number)


def test_numbers_further_up_are_no_checkpoints_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("user2/run").mkdir(parents=True)
    Path("user2/run/best.pt").touch()
    with pytest.raises(FlatminimaError, match="no number in its name"):
        in_order(["user2/run/best.pt"])


def test_the_order_is_that_of_numbers_run_by_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/checkpoint-1000", "b/checkpoint-200", "b/last", "a/checkpoint-300"):
        Path(name).mkdir(parents=True)
    ordered = in_order(["b/checkpoint-1000", "a/checkpoint-300", "1500=b/last", "b/checkpoint-200"])
    assert said_order(ordered) == "b: step 200, 1000, 1500; a: step 300"
