"""Checkpoints of trainings on the command line: their order, their measures, and what is kept of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatminima import Characterization, cli, measure
from flatminima.cli.main import INTERRUPTED
from flatminima.lab.runs import tracked as tracking_of_checkpoints
from flatminima.lab.runs.measuring import measure_images
from flatminima.lab.runs.networks import load_checkpoint
from flatminima.sampling import draw_subsets
from support.command_line import MEASURE, error_of
from support.lazily import needs
from support.own_data import class_folders, sentences, text_classifier, tokenizer_of_words, written

pytestmark = [
    pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning"),
    pytest.mark.xdist_group("commands"),
]

NETWORKS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def build():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))

def samples(split):
    generator = torch.Generator().manual_seed(len(split))
    return TensorDataset(torch.randn(24, 6, generator=generator), torch.arange(24) % 2)
"""
WHAT = ("--model", "tracked_networks:build", "--data", "tracked_networks:samples")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def samples(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(len(split))), torch.arange(24) % 2


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network in a file, and a run's checkpoints of data parallel training."""
    (tmp_path / "tracked_networks.py").write_text(NETWORKS)
    (tmp_path / "run").mkdir()
    for epoch in (2, 10):
        torch.save(
            {f"module.{name}": tensor for name, tensor in network(epoch).state_dict().items()},
            tmp_path / "run" / f"epoch-{epoch}.pt",
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


CHECKPOINTS = ("run/epoch-10.pt", "run/epoch-2.pt")


def tracked(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[Any, str]:
    assert cli.main(["track", *arguments, *MEASURE, "--json"]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_checkpoints_are_measured_in_their_order_on_the_same_subsets(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = tracked(capsys, *CHECKPOINTS, *WHAT, "--test-data", "tracked_networks:samples")
    rows = found["checkpoints"]
    assert [(row["run"], row["epoch"]) for row in rows] == [("run", 2), ("run", 10)]
    inputs, targets = samples("test")
    for row in rows:
        model = network(row["epoch"])
        expected = measure(model, samples("train"), subset_size=20, trials=2, measures=(), progress=False)
        own = Characterization.from_json(json.dumps(row["characterization"]))
        assert own.log_det_fisher.per_trial == pytest.approx(expected.log_det_fisher.per_trial, rel=1e-5)
        assert row["test_error"] == float((model(inputs).argmax(1) != targets).double().mean())
    assert "the order: run: epoch 2, 10" in err
    assert err.count("'module.' was taken off the names") == 1


def test_what_is_kept_is_not_measured_again_but_other_weights_are(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(taken) == 1:
            raise KeyboardInterrupt
        taken.append(arguments)
        return measure_images(*arguments, **options)

    monkeypatch.setattr(tracking_of_checkpoints, "measure_images", counted)
    assert cli.main(["track", *CHECKPOINTS, *WHAT, *MEASURE]) == INTERRUPTED
    assert "interrupted: measured checkpoints are kept" in capsys.readouterr().err
    monkeypatch.setattr(tracking_of_checkpoints, "measure_images", measure_images)
    whole, _ = tracked(capsys, *CHECKPOINTS, *WHAT)
    monkeypatch.setattr(tracking_of_checkpoints, "measure_images", counted)
    assert tracked(capsys, *CHECKPOINTS, *WHAT)[0] == whole
    taken.clear()
    torch.save(network(3).state_dict(), "run/epoch-2.pt")
    again, _ = tracked(capsys, *CHECKPOINTS, *WHAT)
    assert len(taken) == 1
    assert again["checkpoints"][0] != whole["checkpoints"][0]
    assert again["checkpoints"][1] == whole["checkpoints"][1]


def test_what_another_command_has_written_meanwhile_stays(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(tracking_of_checkpoints, "measure_images", measure_images)
        assert cli.main(["track", "run/epoch-2.pt", *WHAT, *MEASURE, "--trials", "1"]) == 0
        return measure_images(*arguments, **options)

    monkeypatch.setattr(tracking_of_checkpoints, "measure_images", with_another)
    assert cli.main(["track", *CHECKPOINTS, *WHAT, *MEASURE]) == 0
    kept = [json.loads(line) for line in Path("tracked.jsonl").read_text().splitlines()]
    assert sorted((line["number"], line["asked"]["trials"]) for line in kept) == [(2, 1), (2, 2), (10, 2)]


def test_every_checkpoint_is_loaded_once(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(path: Path, *arguments: Any) -> Any:
        loaded.append(str(path))
        return load_checkpoint(path, *arguments)

    monkeypatch.setattr(tracking_of_checkpoints, "load_checkpoint", load)
    assert cli.main(["track", *CHECKPOINTS, *WHAT, *MEASURE]) == 0
    assert sorted(loaded) == sorted(CHECKPOINTS)


def test_data_that_changed_where_no_subset_is_and_other_code_are_measured_again(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unused = min(set(range(24)) - set(draw_subsets(24, 20, 1, 0)[0]))
    relabelled = f"(torch.arange(24) + (torch.arange(24) == {unused})) % 2)"

    def measured(module: str) -> dict[str, Any]:
        Path("tracked_networks.py").write_text(module)
        monkeypatch.delitem(sys.modules, "tracked_networks", raising=False)
        assert cli.main(["track", "run/epoch-2.pt", *WHAT, *MEASURE, "--trials", "1", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["checkpoints"][0]["characterization"]
        return found

    first = measured(NETWORKS)
    second = measured(NETWORKS.replace("torch.arange(24) % 2)", relabelled))
    assert second["train_loss"] != first["train_loss"]
    assert second["log_det_fisher"] == first["log_det_fisher"]
    measured(NETWORKS.replace("def build():", "def build():  # other code, whose weights are the same"))
    assert len(Path("tracked.jsonl").read_text().splitlines()) == 3


def test_a_checkpoint_that_cannot_be_measured_is_left_out_with_a_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmed = network(0)
    with torch.no_grad():
        harmed[0].weight.fill_(float("nan"))
    torch.save(harmed.state_dict(), "run/epoch-5.pt")
    found, err = tracked(capsys, *CHECKPOINTS, "run/epoch-5.pt", *WHAT, status=1)
    assert [row["epoch"] for row in found["checkpoints"]] == [2, 10]
    assert found["left_out"] == ["run/epoch-5.pt"]
    assert "warning: run/epoch-5.pt: epoch 5 is not tracked: " in err


def test_runs_have_a_table_with_a_rule_between_them_and_a_picture_each(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "other").mkdir()
    torch.save(network(1).state_dict(), "other/step_7.pt")
    given = ["track", *CHECKPOINTS, "other/step_7.pt", *WHAT, "--plot", "pictures/epochs.svg"]
    assert cli.main([*given, *MEASURE]) == 0
    out = capsys.readouterr().out
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")][:3] == [
        "run epoch 2",
        "run epoch 10",
        "other step 7",
    ]
    assert "pictures/epochs.svg shows it as a picture." in out
    svg = Path("pictures/epochs.svg").read_text()
    assert all(f"<!-- {word} -->" in svg for word in ("epoch", "step", "run", "other", "training error"))


@needs("transformers")
def test_folders_of_transformers_trainer_are_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts, labels = sentences(24)
    rows = "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    Path("reviews.csv").write_text(f"text,label\n{rows}")
    for step in (500, 1000):
        written(Path(f"out/checkpoint-{step}"), text_classifier(seed=step), tokenizer_of_words())
    given = ("out/checkpoint-1000", "out/checkpoint-500", "--data", "reviews.csv", "--double")
    found, _ = tracked(capsys, *given, "--on-singular", "skip")
    assert [row["step"] for row in found["checkpoints"]] == [500, 1000]
    assert "at most 16 tokens" in found["checkpoints"][0]["preparation"]["name"]
    assert "out holds checkpoints and is none: give out/checkpoint-* (2)" in error_of(
        capsys, ["track", "out", "--data", "reviews.csv"]
    )
    for each in Path("out/checkpoint-500").iterdir():
        each.unlink()
    nothing = error_of(capsys, ["track", "out/checkpoint-500", "--data", "reviews.csv"], lines=3)
    assert nothing.startswith("flatminima: error: out/checkpoint-500 is not a run folder")


def test_a_guessed_normalization_is_that_of_the_runs_last_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(here / "photos", count=15)
    (here / "tracked_photo_networks.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(108, 2))\n"
    )
    for epoch, scale in ((1, 0.0), (2, 1.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale).add_((1 - scale) * torch.randn_like(parameter))
        torch.save(model.state_dict(), f"run/photos-{epoch}.pt")
    given = ("-m", "tracked_photo_networks:build", "-d", "photos", "--crop", "6")
    found, err = tracked(capsys, "run/photos-1.pt", "run/photos-2.pt", *given)
    alone, _ = tracked(capsys, "run/photos-2.pt", *given)
    means = [row["preparation"]["mean"] for row in found["checkpoints"]]
    assert means == [alone["checkpoints"][0]["preparation"]["mean"]] * 2
    assert err.count("does not say how its images were normalized") == 1
    torch.save({name: tensor * torch.nan for name, tensor in model.state_dict().items()}, "run/photos-3.pt")
    diverged, err = tracked(capsys, *(f"run/photos-{n}.pt" for n in (1, 2, 3)), *given, status=1)
    assert [row["preparation"]["mean"] for row in diverged["checkpoints"]] == means
    assert err.count("does not say how its images were normalized") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "track takes checkpoints"),
        (["run/epoch-2.pt"], "track needs the training data: add --data"),
        (["run/epoch-3.pt", *WHAT], "there is no checkpoint run/epoch-3.pt; beside it are epoch-10.pt, epoch-2.pt"),
        (["nowhere/*.pt", *WHAT], "there is no checkpoint nowhere/*.pt: there is no folder nowhere"),
        (["run/final.pt", *WHAT], "run/final.pt: no number in its name says when it was written: give it as NUMBER="),
        (["2=run/final.pt", "run/epoch-2.pt", *WHAT], "both have the epoch 2"),
        (["run/epoch-2.pt", "run/step-5.pt", *WHAT], "epoch-2.pt counts by epoch, step-5.pt by step"),
        (["run/epoch-2.pt", *WHAT, "--plot", "x.jpgg"], "give it one of the suffixes ."),
        (["run/epoch-2.pt", *WHAT, "--out", "run"], "cannot write run: it is a folder"),
        (["run/epoch-2.pt", *WHAT, "--test-split", "val"], "--test-split goes with --test-data"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(
    given: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("final", "step-5"):
        torch.save(network(0).state_dict(), f"run/{name}.pt")
    assert said in error_of(capsys, ["track", *given])


def test_wrong_files_and_data_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["track", "run/epoch-2.pt"]
    assert "name its model too" in error_of(capsys, [*given, *WHAT[2:]], lines=3)
    Path("kept.jsonl").write_text("{}\n")
    assert "kept.jsonl is not what track wrote: name another file" in error_of(
        capsys, [*given, *WHAT, "--out", "kept.jsonl"], lines=3
    )
    Path("same_data.py").write_text("from tracked_networks import samples\ndef ours():\n    return samples('train')\n")
    assert "the test data are the training data" in error_of(
        capsys, [*given, *WHAT, "--test-data", "same_data:ours", *MEASURE], lines=4
    )
