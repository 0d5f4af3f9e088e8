"""A user's own network, trained in the lab."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatminima import cli, measure
from flatminima.errors import FlatminimaError
from flatminima.lab.errors import ChangedCodeWarning
from flatminima.lab.networks import new_network
from flatminima.lab.runs import RunSpec
from flatminima.lab.runs.sets import load_run
from support.command_line import MEASURE, error_of
from support.images import image_set, random_images

TRAIN = ["train", "digits", "--epochs", "1", "--train-size", "200", "--no-progress", "--root", "runs"]
CODE = """
from torch import nn

def build(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))

def narrow(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3, num_classes))

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def frozen():
    return nn.Linear(64, 10).requires_grad_(False)

def nothing():
    return None
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "networks_to_train.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("networks_to_train", None)


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_it_is_trained_measured_and_known_again_by_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--model", "networks_to_train:build", "--json"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["folder"])
    assert folder.name.startswith("build-")
    assert cli.main(["measure", str(folder), *MEASURE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    _, model, clean, _ = load_run(folder)
    expected = measure(model, clean, subset_size=20, trials=2, measures=(), progress=False)
    assert found["log_det_fisher"]["mean"] == pytest.approx(expected.log_det_fisher.mean, rel=1e-6)
    (tmp_path / "networks_to_train.py").write_text(CODE + "\nimport torch\n")
    importlib.reload(sys.modules["networks_to_train"])
    with pytest.warns(ChangedCodeWarning, match="the code of model networks_to_train:build has changed"):
        load_run(folder)
    assert cli.main([*TRAIN, "--model", "networks_to_train:build"]) == 0
    said = capsys.readouterr().err
    assert "has changed since" in said
    assert "remove that folder to train it anew" in " ".join(said.split())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("networks_to_train:narrow", "does not take images of shape (1, 8, 8)"),
        ("networks_to_train:few", "has 3 outputs, but the data have 10 classes"),
        ("networks_to_train:frozen", "it has no trainable parameters"),
        ("networks_to_train:nothing", "it returned NoneType, not a torch.nn.Module"),
        ("networks_to_train:bild", "has no function or class 'bild' (did you mean 'build'?)"),
        ("nowhere_to_be_found:build", "cannot import 'nowhere_to_be_found'"),
        ("timm:resnet18", "to train it, return it from package.module:factory"),
    ],
)
def test_what_cannot_be_trained_is_one_line(model: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(capsys, [*TRAIN, "--model", model])


def test_a_factory_is_told_the_data_and_a_description_takes_its_name() -> None:
    images = image_set(images=random_images(7, height=8, width=8))
    assert new_network("networks_to_train:build", images)[0].in_channels == 3
    assert RunSpec(model="networks_to_train:build").model == "networks_to_train:build"
    with pytest.raises(FlatminimaError, match="unknown model 'a:b:c'"):
        RunSpec(model="a:b:c")
