from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import (
    FlatminimaError,
    FlatminimaWarning,
    NotAMinimumWarning,
    NotLogitsWarning,
    RankDeficientError,
    UnlikeModelsWarning,
    UnshiftedLabelsWarning,
)

N, CLASSES, LENGTH = 20, 4, 6
torch.manual_seed(0)
X, Y = torch.randn(N, 5, dtype=torch.float64), torch.arange(N) % CLASSES
TOKENS = torch.randint(0, CLASSES, (N, LENGTH))
OPTIONS: dict[str, Any] = {"subset_size": 6, "trials": 2, "progress": False, "measures": ()}


def mlp(*last: nn.Module, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, CLASSES), *last).double()


def language_model(sharpness: float = 1.0) -> nn.Module:
    """One that says what it is given, the surer the sharper."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES)).double()
    model[0].weight.data[:, :CLASSES] = torch.eye(CLASSES)
    model[1].weight.data[:, :CLASSES] = sharpness * torch.eye(CLASSES)
    model[1].weight.data[:, CLASSES:] *= 0.1
    return model


def warned(model: nn.Module, data: Any, loss: Any) -> set[type[Warning]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fm.measure(model, data, loss=loss, on_singular="skip", **OPTIONS)
    return {w.category for w in caught if issubclass(w.category, FlatminimaWarning)} - {
        fm.errors.SingularTrialWarning,
        fm.errors.GenericPathWarning,
    }


def random_tokens() -> Tensor:
    return torch.randint(0, CLASSES, (N, LENGTH), generator=torch.Generator().manual_seed(1))


class Positional(nn.Module):
    """Sees the position, so that samples' gradients are independent."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.inner, self.position = language_model(sharpness), nn.Parameter(0.1 * torch.randn(LENGTH, CLASSES).double())

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(tokens) * (1 + self.position)
        return logits


@pytest.mark.parametrize(
    ("loss", "targets", "expected"),
    [
        (fm.CrossEntropy(), TOKENS, {UnshiftedLabelsWarning}),
        ("cross_entropy", TOKENS.where(TOKENS > 0, -100), {UnshiftedLabelsWarning}),
        (fm.CrossEntropy(next_token=True), TOKENS, {NotAMinimumWarning}),
        (fm.CrossEntropy(), random_tokens(), {NotAMinimumWarning}),
        (fm.CrossEntropy(positions="sum"), random_tokens(), {NotAMinimumWarning}),
        (fm.CrossEntropy(positions="sum"), TOKENS, {UnshiftedLabelsWarning}),
    ],
)
def test_tokens_that_are_their_own_labels_and_losses_far_from_a_minimum(loss, targets, expected) -> None:
    assert warned(Positional(20.0), (TOKENS, targets), loss) == expected


@pytest.mark.parametrize(
    ("model", "targets", "loss", "expected"),
    [
        (mlp(nn.Softmax(1)), Y, "cross_entropy", True),
        (mlp(nn.LogSoftmax(1)), Y, "cross_entropy", False),
        (mlp(nn.ReLU()), Y, "cross_entropy", False),
        (mlp(nn.Sigmoid()), torch.rand(N, CLASSES), nn.BCEWithLogitsLoss(), True),
        (mlp(), torch.rand(N, CLASSES), nn.BCEWithLogitsLoss(), False),
        (mlp(nn.Softmax(1)), torch.rand(N, CLASSES), nn.MSELoss(), False),
    ],
)
def test_probabilities_in_the_place_of_logits(model, targets, loss, expected) -> None:
    assert (NotLogitsWarning in warned(model, (X, targets), loss)) == expected


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_architectures_of_different_kinds() -> None:
    with pytest.warns(UnlikeModelsWarning, match=r"'a' has 84 trainable parameters, 'b' 164"):
        fm.compare({"a": mlp(width=8), "b": mlp()}, (X, Y), **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnlikeModelsWarning)
        fm.compare({"a": mlp(), "b": mlp()}, (X, Y), **OPTIONS)


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, CLASSES)).double()
        self.net[0].bias.data.fill_(-100)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_a_network_of_constant_outputs_is_told_so() -> None:
    with pytest.raises(RankDeficientError, match="returns the same outputs for different samples") as raised:
        fm.measure(Dead(), (X, Y), **OPTIONS)
    assert "duplicates" not in str(raised.value)
    head_at_zero = mlp()
    head_at_zero[2].weight.data.zero_()
    assert fm.measure(head_at_zero, (X, Y), **{**OPTIONS, "subset_size": 4}).log_det_fisher.mean > -1e3


class MonteCarlo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = nn.functional.dropout(self.net(x), 0.5, training=True)
        return logits


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_a_network_that_is_random_in_eval_mode_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="the network is random in eval mode"):
        fm.measure(MonteCarlo(), (X, Y), **OPTIONS)
