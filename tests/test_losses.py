from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from torch import nn

from flatminima.errors import FlatminimaError, NonFiniteError, WrongGradientError
from flatminima.gramian.planning import LOGITS
from flatminima.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    LogitGradient,
    is_single_label,
    logit_gradient,
    mean_loss,
)
from flatminima.losses.known import PIECE_ELEMENTS


def plain(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12), scale=st.floats(0.1, 10))
def test_cross_entropy_equals_autograd(seed: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (6,), generator=generator)
    ours, reference = logit_gradient("cross_entropy", logits, targets), logit_gradient(plain, logits, targets)
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-9, atol=1e-14)
    delta = ours.direction * ours.log_norm.exp()[:, None]
    torch.testing.assert_close(delta, reference.direction * reference.log_norm.exp()[:, None], rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(ours.direction.norm(dim=1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("margin", [1.0, 40.0, 700.0, 5000.0])
def test_gradient_keeps_its_digits_however_small(margin: float) -> None:
    """Against 60-digit arithmetic, at losses down to e^-5000."""
    mp.dps = 60 + int(margin / math.log(10)) * 2
    logits = [margin, 0.0, 0.5]
    weights = [mp.e ** mp.mpf(z) for z in logits]
    p = [w / sum(weights) for w in weights]
    delta = [p[0] - 1, p[1], p[2]]
    norm = mp.sqrt(sum(d * d for d in delta))
    ours = logit_gradient("cross_entropy", torch.tensor([logits], dtype=torch.float64), torch.tensor([0]))
    assert ours.log_norm.item() == pytest.approx(float(mp.log(norm)), rel=1e-14)
    assert ours.direction[0].tolist() == pytest.approx([float(d / norm) for d in delta], rel=1e-12)
    assert ours.loss.item() == pytest.approx(float(-mp.log(p[0])), rel=1e-12, abs=1e-300)


def test_any_per_sample_loss() -> None:
    logits, targets = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    ours = logit_gradient(lambda z, t: (z - t).square().sum(1), logits, targets)
    torch.testing.assert_close(ours.direction * ours.log_norm.exp()[:, None], 2 * (logits - targets))


def test_zero_gradient_is_minus_infinity_and_no_nan() -> None:
    ours = logit_gradient(lambda z, t: (z - t).square().sum(1), torch.ones(2, 3), torch.ones(2, 3))
    assert ours.log_norm.tolist() == [-math.inf, -math.inf]
    assert ours.direction.count_nonzero() == 0


@pytest.mark.parametrize(
    ("loss", "logits", "targets", "error", "message"),
    [
        ("hinge", torch.zeros(2, 3), torch.zeros(2).long(), FlatminimaError, "unknown loss 'hinge'"),
        ("cross_entropy", torch.zeros(2, 3), torch.tensor([0, 3]), FlatminimaError, "3 outputs"),
        ("cross_entropy", torch.zeros(2, 3), torch.tensor([-100, 1]), FlatminimaError, "from -100 to 1"),
        ("cross_entropy", torch.zeros(2, 3), torch.zeros(2, 3), FlatminimaError, "class indices"),
        ("cross_entropy", torch.zeros(2, 1), torch.zeros(2).long(), FlatminimaError, "K ≥ 2"),
        ("cross_entropy", torch.tensor([[1.0, math.nan], [0, 0]]), torch.zeros(2).long(), NonFiniteError, r"\[0\]"),
        (lambda z, t: z.mean(), torch.zeros(2, 3), torch.zeros(2).long(), FlatminimaError, "reduction='none'"),
        (lambda z, t: z.sum(1).log(), torch.zeros(2, 3), torch.zeros(2), NonFiniteError, "losses"),
    ],
)
def test_bad_input_is_named(loss, logits, targets, error, message) -> None:
    with pytest.raises(error, match=message):
        logit_gradient(loss, logits, targets)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 100))
def test_logit_normalization_equals_autograd_through_it(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (6,), generator=generator)

    def normalized(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return plain(z / (0.3 * z.norm(dim=1, keepdim=True)), y)

    ours = logit_gradient("cross_entropy", logits, targets, logit_normalization=0.3)
    reference = logit_gradient(normalized, logits, targets)
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(
        ours.direction * ours.log_norm.exp()[:, None],
        reference.direction * reference.log_norm.exp()[:, None],
        rtol=1e-6,
        atol=1e-13,
    )


def test_logit_normalization_refuses_zero_logits() -> None:
    with pytest.raises(FlatminimaError, match="not all zero"):
        logit_gradient("cross_entropy", torch.zeros(2, 3), torch.zeros(2).long(), logit_normalization=0.04)


def explicit(loss: LogitGradient) -> torch.Tensor:
    """δ multiplied out."""
    return loss.direction * loss.log_norm.exp().view(-1, *[1] * (loss.direction.dim() - 1))


def tokens(shift: bool, reduction: str, epsilon: float, weight: torch.Tensor | None):
    """What `CrossEntropy` should be, written with PyTorch's own function, one sample at a time."""

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        z, y = (logits[:, :-1], targets[:, 1:]) if shift else (logits, targets)
        losses = []
        for one, labels in zip(z, y, strict=True):
            each = F.cross_entropy(one, labels, reduction="none", label_smoothing=epsilon, weight=weight)
            each = each[labels != -100]
            losses.append(each.sum() if reduction == "sum" else each.sum() / max(len(each), 1))
        return torch.stack(losses)

    return loss


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_token_level_cross_entropy(shift: bool, reduction: str) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 6, 5, dtype=torch.float64), torch.randint(0, 5, (3, 6))
    targets[0, 2:4] = -100
    targets[1, 1:] = -100
    ours = logit_gradient(CrossEntropy(next_token=shift, positions=reduction), logits, targets)
    reference = logit_gradient(tokens(shift, reduction, 0.0, None), logits, targets)
    torch.testing.assert_close(ours.loss, reference.loss)
    torch.testing.assert_close(explicit(ours), explicit(reference))


def test_a_sequence_with_no_position_that_counts_has_zero_gradient() -> None:
    logits, targets = torch.randn(2, 4, 5, dtype=torch.float64), torch.full((2, 4), -100)
    targets[0] = 1
    ours = logit_gradient(CrossEntropy(), logits, targets)
    assert ours.log_norm[1] == -math.inf
    assert ours.direction[1].count_nonzero() == 0
    assert ours.loss[1] == 0


def test_classes_may_come_second_as_in_pytorch() -> None:
    logits, targets = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randint(0, 5, (2, 3, 4))
    ours = logit_gradient(nn.CrossEntropyLoss(), logits, targets)
    reference = logit_gradient(lambda z, y: F.cross_entropy(z, y, reduction="none").flatten(1).mean(1), logits, targets)
    torch.testing.assert_close(explicit(ours), explicit(reference))


def test_label_smoothing_and_class_weights_are_read_from_pytorchs_loss() -> None:
    weight = torch.rand(5, dtype=torch.float64) + 0.5
    logits, targets = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    ours = logit_gradient(smoothed, logits, targets)
    reference = logit_gradient(
        lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1), logits, targets
    )
    torch.testing.assert_close(explicit(ours), explicit(reference))
    torch.testing.assert_close(ours.loss, reference.loss)
    ours = logit_gradient(nn.CrossEntropyLoss(weight=weight), logits, targets)
    reference = logit_gradient(lambda z, y: F.cross_entropy(z, y, reduction="none", weight=weight), logits, targets)
    torch.testing.assert_close(explicit(ours), explicit(reference))
    with pytest.raises(FlatminimaError, match="both weight and label_smoothing"):
        logit_gradient(nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), logits, targets)


def test_binary_cross_entropy_keeps_its_digits() -> None:
    logits = torch.tensor([[3.0, -2.0], [500.0, 0.5], [-900.0, -850.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.3], [0.0, 0.0]])
    ours = logit_gradient(nn.BCEWithLogitsLoss(), logits, targets)
    reference = logit_gradient(
        lambda z, y: F.binary_cross_entropy_with_logits(z, y.double(), reduction="none").mean(1), logits, targets
    )
    torch.testing.assert_close(explicit(ours)[:2], explicit(reference)[:2])
    assert ours.log_norm[2].item() == pytest.approx(-850 - math.log(2), rel=1e-12)  # e^-900 beside e^-850 is nothing
    torch.testing.assert_close(ours.loss, reference.loss)


def test_mean_squared_error_and_other_modules() -> None:
    logits, targets = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(explicit(logit_gradient(nn.MSELoss(), logits, targets)), 2 * (logits - targets) / 3)
    with pytest.raises(FlatminimaError, match="L1Loss averages over the batch"):
        logit_gradient(nn.L1Loss(), logits, targets)


def test_a_chunk_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 5
    whole = logit_gradient("cross_entropy", logits, targets, logit_normalization=0.1)
    monkeypatch.setattr("flatminima.losses.gradients.CHUNK_ELEMENTS", 10)
    parts = logit_gradient("cross_entropy", logits, targets, logit_normalization=0.1)
    torch.testing.assert_close(explicit(parts), explicit(whole))
    assert torch.equal(parts.loss, whole.loss)


@pytest.mark.parametrize(
    ("shape", "next_token"), [((3, 7, 5), False), ((3, 7, 5), True), ((3, 5, 7), False), ((3, 5, 2, 4), False)]
)
def test_a_piece_of_positions_at_a_time_gives_the_same(
    shape: tuple[int, ...], next_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(shape, dtype=torch.float64)
    targets = torch.randint(0, 5, shape[:-1] if shape == (3, 7, 5) else (shape[0], *shape[2:]))
    targets[0, -1], targets[1] = -100, -100
    loss = CrossEntropy(label_smoothing=0.1, next_token=next_token, class_dimension=-1 if shape[-1] == 5 else 1)
    whole = logit_gradient(loss, logits, targets)
    monkeypatch.setattr("flatminima.losses.known.PIECE_ELEMENTS", 40)
    pieces = logit_gradient(loss, logits, targets)
    torch.testing.assert_close(explicit(pieces), explicit(whole), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-12, atol=0)


def test_a_single_token_has_no_next_one() -> None:
    with pytest.raises(FlatminimaError, match="needs logits of shape"):
        logit_gradient(CrossEntropy(next_token=True), torch.randn(2, 1, 5), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_one_sample_of_many_tokens_takes_no_more_than_the_plan_allows_for() -> None:
    """A language model's logits of one sample, 32 MiB in float32."""

    def peak() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

    tokens, classes = 256, 2**15
    logits, targets = torch.randn(1, tokens, classes), torch.randint(0, classes, (1, tokens))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    logit_gradient(CrossEntropy(next_token=True), logits, targets)
    pieces = 12 * 8 * PIECE_ELEMENTS
    assert peak() - before < (LOGITS - 1) * logits.numel() * logits.element_size() + pieces  # the logits are there


class Focal(nn.CrossEntropyLoss):
    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        entropy = F.cross_entropy(logits, targets, reduction="none")
        return (1 - (-entropy).exp()).square() * entropy


class Absolute(nn.MSELoss):
    def forward(self, prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (prediction - targets).abs().mean(1)


class Doubled(CrossEntropy):
    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 2 * plain(logits, targets)


@pytest.mark.parametrize("loss", [Focal(), Focal(reduction="none"), Absolute(), Doubled()])
def test_a_subclass_is_the_loss_that_it_computes(loss) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    targets = torch.randn(4, 3, dtype=torch.float64) if isinstance(loss, Absolute) else torch.tensor([0, 2, 1, 1])
    leaf = logits.clone().requires_grad_()
    values = loss(leaf, targets)
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    ours = logit_gradient(loss, logits, targets)
    torch.testing.assert_close(ours.loss, values.detach())
    torch.testing.assert_close(explicit(ours), expected)
    assert not is_single_label(loss, logits)


REDUCED = {
    "squared error": (nn.MSELoss, (5, 4), None),
    "squared error of pixels": (nn.MSELoss, (5, 2, 3, 3), None),
    "binary": (nn.BCEWithLogitsLoss, (5, 4), None),
    "cross entropy": (nn.CrossEntropyLoss, (5, 4), (5,)),
    "cross entropy of positions": (nn.CrossEntropyLoss, (5, 4, 3, 3), (5, 3, 3)),
    "cross entropy of as many positions as classes": (nn.CrossEntropyLoss, (5, 4, 4), (5, 4)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", REDUCED)
def test_what_pytorchs_loss_gives_a_sample_alone_is_its_loss(name: str, reduction: str) -> None:
    """PyTorch's own module on one sample at a time: it averages, or sums, over outputs and positions."""
    kind, shape, labels = REDUCED[name]
    torch.manual_seed(1)
    logits, loss = torch.randn(shape, dtype=torch.float64), kind(reduction=reduction)
    targets = torch.rand(shape, dtype=torch.float64) if labels is None else torch.randint(0, 4, labels)
    leaf = logits.clone().requires_grad_()
    values = torch.stack([loss(leaf[i : i + 1], targets[i : i + 1]) for i in range(5)])
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    ours = logit_gradient(loss, logits, targets)
    torch.testing.assert_close(ours.loss, values.detach())
    torch.testing.assert_close(explicit(ours), expected)


@pytest.mark.parametrize("name", [name for name in REDUCED if name != "cross entropy"])
def test_several_values_per_sample_that_nothing_reduces_are_refused(name: str) -> None:
    kind, shape, labels = REDUCED[name]
    targets = torch.rand(shape) if labels is None else torch.zeros(labels, dtype=torch.long)
    with pytest.raises(FlatminimaError, match="values per sample"):
        logit_gradient(kind(reduction="none"), torch.randn(shape), targets)


def test_one_value_per_sample_needs_no_reduction() -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    ours = logit_gradient(nn.CrossEntropyLoss(reduction="none"), logits, labels)
    assert torch.equal(explicit(ours), explicit(logit_gradient("cross_entropy", logits, labels)))
    assert is_single_label(nn.CrossEntropyLoss(reduction="none"), logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_integers_of_any_size(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    ours = logit_gradient("cross_entropy", logits, labels.to(dtype))
    assert torch.equal(explicit(ours), explicit(logit_gradient("cross_entropy", logits, labels)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\), got 1.5"),
        (lambda: CrossEntropy(label_smoothing=-0.1), "label_smoothing"),
        (lambda: CrossEntropy(positions="average"), "unknown positions='average'"),
        (lambda: CrossEntropy(class_dimension=2), "class_dimension"),
        (lambda: BinaryCrossEntropy(outputs="none"), "unknown outputs='none'"),
    ],
)
def test_a_value_outside_its_range_is_refused(make, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        make()


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), nn.BCEWithLogitsLoss(reduction="sum")])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([-1.0, 1.0], "targets in .* from -1 to 1: labels are 0 and 1"),
        ([0, 2], "from 0 to 2"),
        ([1.01, 0.5], "from 0.5 to 1.01"),
        ([math.nan, 0.5], "from nan to nan"),
    ],
)
def test_binary_targets_outside_of_zero_to_one_are_refused(loss, targets: list[float], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        logit_gradient(loss, torch.zeros(2, 1), torch.tensor(targets)[:, None])
    with pytest.raises(FlatminimaError, match=message):
        mean_loss(loss, torch.zeros(2, 1), torch.tensor(targets)[:, None])


@pytest.mark.parametrize("targets", [[True, False], [0, 1], [0.25, 1 + 1e-7]])
def test_binary_targets_of_any_type_from_zero_to_one_are_taken(targets: list[float]) -> None:
    y = torch.tensor(targets)[:, None]
    expected = F.binary_cross_entropy_with_logits(torch.ones(2, 1).double(), y.double(), reduction="none")[:, 0]
    torch.testing.assert_close(BinaryCrossEntropy()(torch.ones(2, 1), y), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss, r"is a class: pass an instance, MSELoss\(\)"),
        (torch.zeros(3), r"unknown loss a tensor of shape \(3,\)"),
        (CrossEntropy(weight=(1.0, 2.0)), "weight has 2 factors, but the model has 3 classes"),
        (lambda z, y: plain(z.detach(), y), "does not depend on the logits"),
        (lambda z, y: plain(z, y).tolist(), "returned list for 4 samples"),
        (nn.L1Loss(reduction="sum"), "L1Loss sums over the batch"),
    ],
)
def test_what_is_no_per_sample_loss_is_refused_in_one_line(loss, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        logit_gradient(loss, torch.randn(4, 3), torch.tensor([0, 2, 1, 1]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: plain(z, y) / len(z),
        lambda z, y: plain(z, y) / plain(z, y).mean(),
        lambda z, y: plain(z - z.mean(0), y),
        lambda z, y: plain(z, y) / (y == 1).sum().clamp_min(1),
    ],
    ids=["by their number", "by their mean", "centred", "by positives"],
)
def test_a_loss_that_depends_on_the_rest_of_its_batch_is_refused(loss) -> None:
    with pytest.raises(WrongGradientError, match=r"another value in another batch .* alone, .* among 4"):
        logit_gradient(loss, torch.randn(4, 3), torch.tensor([0, 2, 1, 1]))


def test_a_scalar_is_the_loss_of_a_single_sample() -> None:
    logits, targets = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    ours = logit_gradient(lambda z, t: (z - t).square().sum(1).squeeze(), logits, targets)
    torch.testing.assert_close(explicit(ours), 2 * (logits - targets))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_soft_labels_are_told_as_what_they_are(reduction: str) -> None:
    with pytest.raises(FlatminimaError, match="integer class indices, got"):
        logit_gradient(nn.CrossEntropyLoss(reduction=reduction), torch.randn(4, 3), torch.rand(4, 3).softmax(1))


@pytest.mark.parametrize(
    ("loss", "logits", "targets", "expected"),
    [
        ("cross_entropy", (5, 4), torch.arange(5) % 4, F.cross_entropy),
        (
            nn.CrossEntropyLoss(label_smoothing=0.1),
            (5, 4),
            torch.arange(5) % 4,
            nn.CrossEntropyLoss(label_smoothing=0.1),
        ),
        (CrossEntropy(), (5, 3, 4), torch.arange(15).view(5, 3) % 4, lambda z, y: F.cross_entropy(z.mT, y)),
        (nn.BCEWithLogitsLoss(), (5, 4), (torch.arange(20).view(5, 4) % 2).double(), nn.BCEWithLogitsLoss()),
        (nn.MSELoss(), (5, 4), torch.ones(5, 4), lambda z, y: F.mse_loss(z, y.double())),
        (nn.MSELoss(reduction="none"), (5, 1), torch.ones(5, 1), lambda z, y: F.mse_loss(z, y.double())),
        (plain, (5, 4), torch.arange(5) % 4, F.cross_entropy),
    ],
)
def test_the_mean_loss_is_differentiable_twice(loss, logits, targets, expected) -> None:
    torch.manual_seed(0)
    z = torch.randn(logits, dtype=torch.float64)
    torch.testing.assert_close(mean_loss(loss, z, targets), expected(z, targets))
    found, reference = (
        torch.autograd.functional.hessian(function, z)
        for function in (lambda z: mean_loss(loss, z, targets), lambda z: expected(z, targets))
    )
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-14)


def test_the_mean_loss_has_a_gradient_however_small_it_is() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.5]], requires_grad=True)
    mean_loss("cross_entropy", logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    exact = [-(math.exp(-60) + math.exp(-59.5)), math.exp(-60), math.exp(-59.5)]
    assert logits.grad[0].tolist() == pytest.approx(exact, rel=1e-6)


WEIGHT = torch.tensor([1.0, 0.1, 3.0])


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", WEIGHT.clone())

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, weight=self.weight, reduction="none")


def squared(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(logits, targets, reduction="none").sum(1)


def multiplied(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -torch.einsum("nk,nk->n", logits.log_softmax(1), targets)


@pytest.mark.parametrize(
    ("loss", "targets", "expected"),
    [
        (
            functools.partial(F.cross_entropy, weight=WEIGHT, reduction="none"),
            torch.tensor([0, 1, 2, 1]),
            CrossEntropy(weight=WEIGHT),
        ),
        (Weighted(), torch.tensor([0, 1, 2, 1]), CrossEntropy(weight=WEIGHT)),
        (squared, torch.eye(4)[:, :3], nn.MSELoss(reduction="sum")),
        (multiplied, torch.eye(3)[[0, 1, 2, 1]], lambda z, y: -(z.log_softmax(1) * y).sum(1)),
    ],
    ids=["partial", "module", "targets", "targets, product"],
)
def test_what_a_loss_holds_in_float32_is_taken_in_float64_as_the_logits(loss, targets, expected) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3)
    found, plain = (logit_gradient(form, logits, targets) for form in (loss, expected))
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.log_norm, plain.log_norm, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.direction, plain.direction)
    torch.testing.assert_close(mean_loss(loss, logits, targets), plain.loss.mean(), rtol=1e-12, atol=0)
    if isinstance(loss, nn.Module):
        assert loss.weight.dtype == torch.float32


class InFloat32(Weighted):
    """Casts the logits to its own type."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), targets, weight=self.weight, reduction="none")


def cast(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, weight=weight, reduction="none")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "build",
    [InFloat32, lambda: functools.partial(cast, weight=WEIGHT), lambda: torch.jit.script(InFloat32())],
    ids=["module", "partial", "scripted"],
)
def test_a_loss_may_cast_the_logits_to_what_it_holds(build) -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = logit_gradient(CrossEntropy(weight=WEIGHT), logits, targets)
    torch.testing.assert_close(logit_gradient(build(), logits, targets).loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_a_function_whose_own_weights_are_float32_is_refused_in_one_line() -> None:
    def weighted(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, weight=WEIGHT, reduction="none")

    with pytest.raises(FlatminimaError, match=r"logits in float64.*expected scalar type.*weight\.to\(logits\)"):
        logit_gradient(weighted, torch.randn(4, 3), torch.tensor([0, 1, 2, 1]))
