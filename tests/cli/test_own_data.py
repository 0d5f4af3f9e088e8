"""A stranger's network, data and checkpoints, as they come to ``measure`` and ``compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flatminima import Comparison, cli
from flatminima import measure as measure_in_python
from support.command_line import MEASURE, error_of
from support.own_data import class_folders, sentences, text_classifier, tokenizer_of_words, write_image, written

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")

NETWORKS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, num_classes))

def loader():
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 3, 6, 6), torch.arange(24) % 2), batch_size=5)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network in a file, two checkpoints of data parallel training, and images in class folders."""
    (tmp_path / "nets_of_a_stranger.py").write_text(NETWORKS)
    class_folders(tmp_path / "photos" / "train", count=15)
    for seed in (0, 1):
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in network(seed).state_dict().items()}}, f"{tmp_path}/{seed}.pt"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    assert cli.main([*arguments, *MEASURE, "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def pixels_of_photos(folder: Path) -> torch.Tensor:
    from PIL import Image

    arrays = [np.array(Image.open(path).crop((1, 0, 7, 6))) for path in sorted_photos(folder)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def sorted_photos(folder: Path) -> list[Path]:
    return [path for name in ("cat", "dog") for path in sorted((folder / "photos" / "train" / name).iterdir())]


STRANGER = ("-m", "nets_of_a_stranger:build", "-d", "photos", "--crop", "6")


def test_photos_and_a_checkpoint_are_measured_as_in_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, err = said(capsys, "measure", *STRANGER, "-c", "0.pt", "--normalize", "0.5/0.25")
    inputs = (pixels_of_photos(here) - 0.5) / 0.25
    options = {"subset_size": 20, "trials": 2, "measures": (), "progress": False}
    expected = measure_in_python(network(), (inputs, torch.arange(30) // 15), **options)
    assert found["log_det_fisher"]["mean"] == pytest.approx(expected.log_det_fisher.mean, rel=1e-4)
    assert found["train_loss"] == pytest.approx(expected.train_loss, rel=1e-5)
    assert found["normalization"]["mean"] == [0.5] * 3
    first, second, *_ = err.splitlines()
    assert first.startswith("flatminima: photos, part train: 30 RGB images from the class folders as labels")
    assert "'module.' was taken off the names" in second


def test_checkpoints_are_compared_on_photos(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, err = said(capsys, "compare", "a=0.pt", "1.pt", *STRANGER, "--normalize", "none", "--train-size", "24")
    assert list(found["characterizations"]) == ["a", "1.pt"]
    assert found["characterizations"]["a"]["num_samples"] == 24
    assert list(found["normalizations"]) == ["a", "1.pt"]
    assert "warning: 1.pt: the weights are" in err


def test_a_page_a_figure_and_a_table_for_a_paper_come_with_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--report", "page.html", "--plot", "figures/parts.svg", "--table", "tables/minima.tex")
    found, _ = said(capsys, "compare", "a=0.pt", "b=1.pt", *STRANGER, "--normalize", "none", *files)
    assert "<svg" in Path("page.html").read_text()
    assert "sensitivity" in Path("figures/parts.svg").read_text()
    assert Path("tables/minima.tex").read_text() == Comparison.from_json(json.dumps(found)).to_latex()
    compare = ["compare", "a=0.pt", "b=1.pt", *STRANGER]
    assert "give it the suffix .tex or .md" in error_of(capsys, [*compare, "--table", "t.csv"])
    assert "give it one of the suffixes ." in error_of(capsys, [*compare, "--plot", "parts"])


def test_a_loader_of_ones_own_is_taken_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("measure", "-m", "nets_of_a_stranger:build", "-c", "0.pt", "-d", "nets_of_a_stranger:loader")
    found, err = said(capsys, *arguments)
    assert found["preparation"]["name"] == "as the data give them"
    assert "nets_of_a_stranger:loader: 24 samples as its DataLoader gives them" in err
    assert cli.main([*arguments, *MEASURE]) == 0
    assert "Inputs were made for nets_of_a_stranger:build: as the data give them." in capsys.readouterr().out


def test_text_classifiers_are_compared_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts, labels = sentences(24)
    (tmp_path / "reviews.csv").write_text(
        "text,label\n" + "".join(f"{t},{label}\n" for t, label in zip(texts, labels, strict=True))
    )
    for seed in (0, 1):
        written(tmp_path / f"bert-{seed}", text_classifier(seed=seed), tokenizer_of_words())
    found, err = said(
        capsys, "compare", "hf:bert-0", "other=hf:bert-1", "-d", "reviews.csv", "--on-singular", "skip", "--double"
    )
    assert list(found["characterizations"]) == ["hf:bert-0", "other"]
    assert "at most 16 tokens" in found["preparations"]["other"]["name"]
    assert "24 texts from column 'text', labels from 'label' (2 classes)" in err


def test_what_a_stranger_gets_wrong_is_one_line_that_says_what_to_type(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = ["measure", "-m", "nets_of_a_stranger:build", "-c", "0.pt", "-d"]
    assert "did you mean 'photos'?" in error_of(capsys, [*measure, "photo"])
    assert "does not take images of shape (3, 6, 8)" in error_of(capsys, [*measure, "photos"], lines=3)
    assert "resize must be a number of pixels" in error_of(capsys, [*measure, "photos", "--resize", "0"])
    assert "in_channels must be 1 (grey) or 3 (RGB), got 4" in error_of(
        capsys, [*measure, "photos", "--in-channels", "4"]
    )
    assert "--normalize go with --model" in error_of(capsys, ["measure", "x", "--normalize", "none"])
    assert "--crop go with --model" in error_of(capsys, ["measure", "x", "--crop", "3"])
    assert "--split goes with --model and --data" in error_of(capsys, ["compare", "x", "y", "--split", "test"])
    assert "needs its training data too: add --data digits" in error_of(capsys, ["measure", "-m", "a:b"])
    write_image(here / "photos" / "train" / "emu" / "0.png")
    wrong = [*measure, "photos", "--crop", "6"]
    assert "is its number of classes or its width another?" in error_of(capsys, wrong, lines=2)
    assert "unknown model 'resnet2'" in error_of(capsys, ["measure", "-m", "resnet2", "-d", "photos"], lines=2)


def test_a_network_of_a_run_takes_images_alone(runs: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = ["compare", runs[0], runs[1], "-d"]
    assert "takes images of 8 bits" in error_of(capsys, [*compare, "nets_of_a_stranger:loader"], lines=2)
    assert "trained on images of 1 channels, these have 3: give in_channels" in error_of(
        capsys, [*compare, "photos"], lines=2
    )
