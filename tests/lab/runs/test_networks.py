"""Networks of others see their images as their training did, and it is said how."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flatminima import cli
from flatminima.errors import FlatminimaError, NotAMinimumWarning
from flatminima.lab.data import ImageSet, Normalization, Pictures, load_data, open_data
from flatminima.lab.errors import GuessedNormalizationWarning
from flatminima.lab.reading import Reading
from flatminima.lab.runs.measuring import Measuring, compare_loaded, measure_images
from flatminima.lab.runs.networks import LoadedNetwork, load_network, load_networks
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.runs.training import train
from support.command_line import MEASURE, error_of
from support.images import image_set
from support.own_data import class_folders

HOW = Measuring(subset_size=10, trials=2)

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
"""


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_data("digits")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: ImageSet) -> Path:
    """Checkpoints of the factory's network, trained on pixels from 0 to 1 and from -1 to 1."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "strangers_networks.py").write_text(FACTORY)
    pixels = digits.images / 255
    for name, inputs in {"plain": pixels, "centred": (pixels - 0.5) / 0.5}.items():
        save_file(fitted(inputs, digits.labels).state_dict(), folder / f"{name}.safetensors")
    return folder


def fitted(inputs: Tensor, labels: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def name_of(network: LoadedNetwork) -> str:
    return network.preparation.name


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_normalization_is_arithmetic_on_pixels(digits: ImageSet) -> None:
    colours = image_set()
    for name, expected in {
        "none": colours.images / 255,
        "0.5/0.25": (colours.images / 255 - 0.5) / 0.25,
        "0,0.5,1/1,2,4": (colours.images / 255 - torch.tensor([0, 0.5, 1])[:, None, None])
        / torch.tensor([1, 2, 4.0])[:, None, None],
        "data": colours.tensors()[0],
    }.items():
        found = Normalization.named(name, colours).apply(colours)
        torch.testing.assert_close(found.tensors()[0], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(Normalization.named("data", digits).apply(digits).mean, digits.mean)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "normalize cannot be 'nothing'"),
        ("imagnet", r"did you mean 'imagenet'\?"),
        ("0.5", "as 0.5/0.5"),
        ("0.5/0", "as 0.5/0.5"),
        ("nan/1", "as 0.5/0.5"),
        ("0/1/2", "as 0.5/0.5"),
        ("", "as 0.5/0.5"),
        ("0,0/1,1", "2 means and 2 standard deviations, but the images have 3 channels"),
    ],
)
def test_what_is_no_normalization_is_one_line(name: str, said: str) -> None:
    with pytest.raises(FlatminimaError, match=said) as caught:
        Normalization.named(name, image_set())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("checkpoint", "expected"), [("plain", "none"), ("centred", "0.5/0.5")])
def test_a_guess_is_the_one_of_the_training_and_is_said(
    checkpoint: str, expected: str, here: Path, digits: ImageSet
) -> None:
    with pytest.warns(GuessedNormalizationWarning, match=rf"taken is {expected} .*; give normalize to be sure"):
        guessed = load_network("strangers_networks:build", here / f"{checkpoint}.safetensors", digits)
    given = load_network(
        "strangers_networks:build", here / f"{checkpoint}.safetensors", digits, Reading(normalize=expected)
    )
    assert name_of(guessed) == f"{expected}, a guess"
    assert torch.equal(guessed.data.tensors()[0], given.data.tensors()[0])


@pytest.mark.parametrize("bias", [0.0, 50.0])
def test_a_guess_on_files_takes_the_mean_of_all_and_says_what_fits_too(
    bias: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"blind_networks_{bias:.0f}.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 2))\n"
        f"    net[1].weight.data, net[1].bias.data = torch.zeros(2, 144), torch.tensor([{bias}, 0])\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = open_data(str(class_folders(tmp_path / "photos", count=255))).data
    assert isinstance(data, Pictures)
    data = data.subset(range(255))  # all cats, and more than the candidates are tried on
    with pytest.warns(GuessedNormalizationWarning) as caught:
        network = load_network(f"blind_networks_{bias:.0f}:build", None, data)
    assert network.preparation.is_that_of(Normalization.of(data))
    # All candidates have the same loss, ln 2 or nothing.
    fit_too = "but with none and 0.5/0.5 and imagenet it fits as a minimum does, too"
    assert (fit_too in str(caught[0].message)) == (bias == 50)


def test_a_network_that_fits_nothing_is_left_to_who_measures_it(here: Path, digits: ImageSet) -> None:
    weights = load_file(here / "plain.safetensors")
    weights["1.bias"][0] = float("nan")
    save_file(weights, here / "nan.safetensors")
    network = load_network("strangers_networks:build", here / "nan.safetensors", digits)
    assert name_of(network) == "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = RunSpec(model="mlp", data="digits", train_size=60, augmentation="no-aug", batch_size=20, epochs=1)
    return train(spec, tmp_path_factory.mktemp("runs"), progress=False).folder


def test_a_checkpoint_of_ours_knows_what_it_was_trained_on(run: Path, digits: ImageSet) -> None:
    inverted = replace(digits, images=255 - digits.images)
    found = load_network("mlp", run / "checkpoint.safetensors", inverted)
    assert found.preparation.is_that_of(Normalization.of(digits))


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_networks_are_compared_each_on_its_own_inputs(here: Path, run: Path, digits: ImageSet) -> None:
    paths = {"plain": here / "plain.safetensors", "centred": here / "centred.safetensors"}
    loaded = load_networks(paths, digits, "strangers_networks:build")
    both = compare_loaded(loaded, HOW, device="cpu", progress=False)
    for name, normalization in {"plain": "none", "centred": "0.5/0.5"}.items():
        network = load_network("strangers_networks:build", paths[name], digits, Reading(normalize=normalization))
        alone = measure_images(network.model, network.data, HOW, device="cpu", progress=False)
        assert both.characterizations[name].log_det_fisher == alone.log_det_fisher
    networks = load_networks({**paths, "ours": run}, digits, "strangers_networks:build", Reading(normalize="none"))
    assert [name_of(network) for network in networks.values()] == ["none", "none", "as trained"]
    with pytest.raises(FlatminimaError, match="differently normalized images"):
        compare_loaded(
            {name: networks[name] for name in ("ours", "plain")},
            replace(HOW, max_standard_error=1.0),
            device="cpu",
            progress=False,
        )


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_the_command_line_says_what_was_applied(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = ["measure", "-m", "strangers_networks:build", "-c", "plain.safetensors", "-d", "digits", *MEASURE]

    def said(*arguments: str) -> tuple[Any, str]:
        assert cli.main([*arguments, "--json"]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    guessed, err = said(*measure)
    assert guessed["normalization"] == {"name": "none, a guess", "mean": [0.0], "std": [1.0]}
    assert "does not say how its images were normalized" in err
    assert "(options: --normalize)" in err
    given, err = said(*measure, "--normalize", "none")
    assert given["log_det_fisher"] == guessed["log_det_fisher"]
    assert "normaliz" not in err
    assert cli.main([*measure, "--normalize", "0.5/0.5"]) == 0
    assert "0.5/0.5 (mean 0.5; std 0.5)." in capsys.readouterr().out
    compare = ["compare", "plain.safetensors", "centred.safetensors", "-m", "strangers_networks:build", "-d", "digits"]
    found, _ = said(*compare, *MEASURE, "--normalize", "none")
    assert found["normalizations"]["centred.safetensors"]["mean"] == [0.0]
    assert "normalize cannot be 'x'" in error_of(capsys, [*measure, "--normalize", "x"])
    assert "go with --model" in error_of(capsys, ["measure", "x", "--normalize", "none"])
    assert "--normalize goes with --model" in error_of(capsys, ["compare", "x", "y", "--normalize", "none"])


def test_a_minimum_is_one_on_its_own_inputs_alone(here: Path, digits: ImageSet) -> None:
    plain = load_network("strangers_networks:build", here / "plain.safetensors", digits, Reading(normalize="none"))
    measure_images(plain.model, plain.data, HOW, device="cpu", progress=False)
    wrong = load_network("strangers_networks:build", here / "plain.safetensors", digits, Reading(normalize="data"))
    with pytest.warns(NotAMinimumWarning):
        measure_images(wrong.model, wrong.data, HOW, device="cpu", progress=False)
