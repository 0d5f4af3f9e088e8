from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import (
    FlatminimaError,
    GenericPathWarning,
    NonFiniteError,
    NotAMinimumWarning,
    RankDeficientError,
    SingularTrialWarning,
    UnequalLossWarning,
    WrongGradientError,
)
from flatminima.gramian.engine import factored_gram
from flatminima.gramian.factored import log_determinant
from flatminima.gramian.rules import ParameterUse, rule, temporary_rules
from flatminima.losses import CrossEntropy, Loss
from flatminima.measures import evaluate, jsonable
from flatminima.measures.comparison import comparison_of
from flatminima.measures.results import Characterization, Estimate
from flatminima.network import samples_of
from support.oracles import explicit_gram, explicit_jacobian

N, CLASSES = 60, 4


def minimum(dtype: torch.dtype = torch.float64, sharpness: float = 8.0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with BatchNorm that fits its data: class means far apart, a head along them."""
    torch.manual_seed(0)
    y = torch.arange(N) % CLASSES
    centers = 3 * torch.randn(CLASSES, 3, 6, 6)
    x = centers[y] + 0.3 * torch.randn(N, 3, 6, 6)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(72, CLASSES)).to(dtype)
    x = x.to(dtype)
    model.train()
    for _ in range(30):
        features = model[:-1](x)
    model.eval()
    with torch.no_grad():
        features = model[:-1](x)
        means = torch.stack([features[y == c].mean(0) for c in range(CLASSES)])
        means -= means.mean(0)
        model[-1].weight.copy_(sharpness * means / means.norm(dim=1, keepdim=True))
        model[-1].bias.zero_()
    return model, x, y


def whole(**options) -> dict:
    """One trial on all samples: every measure then has a closed form over the data."""
    return {"subset_size": N, "trials": 1, **options}


def test_every_measure_by_its_definition() -> None:
    model, x, y = minimum(sharpness=2.0)
    c = fm.measure(model, (x, y), **whole())
    xi = explicit_gram(model, x, y)
    eigenvalues = torch.linalg.eigvalsh(xi)
    assert c.log_det_fisher.mean == pytest.approx(torch.linalg.slogdet(xi)[1].item(), rel=1e-9)
    assert c.spectral_radius.mean == pytest.approx(eigenvalues[-1].item(), rel=1e-9)
    assert c.fisher_trace.mean == pytest.approx(xi.trace().item() / N, rel=1e-9)
    assert c.frobenius_norm.mean == pytest.approx(xi.diagonal().square().mean().item(), rel=1e-9)
    assert c.fisher_frobenius_norm.mean == pytest.approx((xi.square().sum() / N**2).item(), rel=1e-9)
    assert sorted(c.spectrum, reverse=True) == list(c.spectrum)
    assert sum(c.spectrum) == pytest.approx(xi.trace().item(), rel=1e-9)
    losses = nn.functional.cross_entropy(model(x), y)
    assert c.train_loss == pytest.approx(losses.item(), rel=1e-9)
    assert c.train_accuracy == 1
    assert c.num_parameters == sum(p.numel() for p in model.parameters())
    assert c.num_samples == N


def test_trials_are_means_over_the_subsets_drawn() -> None:
    model, x, y = minimum(sharpness=2.0)
    c = fm.measure(model, (x, y), subset_size=12, trials=4, seed=3)
    generator = torch.Generator().manual_seed(3)
    expected = []
    for _ in range(4):
        subset = torch.randperm(N, generator=generator)[:12]
        expected.append(torch.linalg.slogdet(explicit_gram(model, x[subset], y[subset]))[1].item())
    assert c.log_det_fisher.per_trial == pytest.approx(expected, rel=1e-9)
    assert c.log_det_fisher.mean == pytest.approx(sum(expected) / 4, rel=1e-9)
    assert c.log_det_fisher.standard_error == pytest.approx(torch.tensor(expected).std().item() / 2, rel=1e-5)


@pytest.mark.parametrize("sharpness", [2.0, 8.0, 12.0, 24.0, 200.0])
def test_float32_agrees_with_float64_at_any_training_loss(sharpness: float) -> None:
    model, x, y = minimum(torch.float32, sharpness)
    single = log_determinant(factored_gram(model, x, y))
    double = copy.deepcopy(model).double()
    xi = factored_gram(double, x.double(), y)
    # far from zero γ̂ is a sum of logits, which float32 rounds by 6e-8 of themselves
    assert single == pytest.approx(log_determinant(xi), rel=1e-7, abs=1e-3)


@pytest.mark.parametrize("target", [1e-2, 1e-4, 1e-6, 1e-9, 1e-12])
def test_float32_agrees_with_float64_at_a_loss_of(target: float) -> None:
    """Down to 1e-9 the reference is plain autograd in float64 on the loss itself: 1 − p_y still has digits there."""
    model, x, y = minimum(torch.float32, 2.0)
    low, high = 0.05, 100.0
    head = model[-1].weight.detach().clone()
    for _ in range(60):  # bisect the head's scale
        middle = (low * high) ** 0.5
        model[-1].weight.data = head * middle
        loss = evaluate(model, samples_of((x, y)), batch=len(y)).loss
        low, high = (middle, high) if loss > target else (low, middle)
    assert loss == pytest.approx(target, rel=0.01)
    assert fm.measure(model, (x, y), trials=1, subset_size=2, measures=()).train_loss == pytest.approx(loss, rel=1e-6)
    if target >= 1e-9:
        reference = torch.linalg.slogdet(explicit_gram(model, x, y))[1].item()
    else:
        reference = log_determinant(factored_gram(copy.deepcopy(model).double(), x.double(), y))
    assert log_determinant(factored_gram(model, x, y)) == pytest.approx(reference, abs=1e-3)


def test_json_round_trip_and_table() -> None:
    model, x, y = minimum()
    c = fm.measure(model, (x, y), subset_size=10, trials=3)
    assert Characterization.from_json(c.to_json()) == c
    text = str(c)
    for word in ("γ̂", "robustness", "training loss", f"{c.log_det_fisher.mean:.6g}"):
        assert word in text
    one = fm.measure(model, (x, y), **whole())
    again = Characterization.from_json(one.to_json())
    assert math.isnan(again.log_det_fisher.standard_error)
    with pytest.raises(FlatminimaError, match="not a characterization"):
        Characterization.from_json('{"a": 1}')


def test_model_is_left_as_it_was() -> None:
    model, x, y = minimum()
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fm.measure(model, (x, y), subset_size=10, trials=2)
    assert model.training
    assert not model[1].training
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_interruption_restores_the_model() -> None:
    model, x, y = minimum()
    model.train()

    def interrupted_backward_pass(n: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[ParameterUse]:
        return [ParameterUse(weight, interrupt)]

    def interrupt(*args):
        raise KeyboardInterrupt

    with temporary_rules():
        rule(nn.functional.linear)(interrupted_backward_pass)
        with pytest.raises(KeyboardInterrupt):
            fm.gram(model, x, y)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_any_loss_and_dict_inputs() -> None:
    torch.manual_seed(0)

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 20)

        def forward(self, features: Tensor) -> Tensor:
            return torch.tanh(self.layer(features)).sum(1, keepdim=True)

    model = Regressor().double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)

    def squared(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().sum(1)

    c = fm.measure(model, ({"features": x}, y), loss=squared, **whole(subset_size=30))
    xi = explicit_gram(model, {"features": x}, y, squared)
    assert c.log_det_fisher.mean == pytest.approx(torch.linalg.slogdet(xi)[1].item(), rel=1e-9)
    assert c.train_accuracy is None
    assert c.robustness is None
    assert c.settings.loss == "squared"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_duplicates_are_named_and_can_be_skipped() -> None:
    model, x, y = minimum()
    x[7] = x[3]
    with pytest.raises(
        RankDeficientError, match=r"trial 0: ξ is singular \(rank 59 of 60\): samples (3 and 7|7 and 3) "
    ):
        fm.measure(model, (x, y), **whole())
    with pytest.warns(SingularTrialWarning, match="of 20 trials"):
        c = fm.measure(model, (x, y), subset_size=30, trials=20, on_singular="skip")
    assert 0 < len(c.singular_trials) < 20
    assert all(math.isnan(c.log_det_fisher.per_trial[t]) for t in c.singular_trials)
    assert math.isfinite(c.log_det_fisher.mean)
    assert Characterization.from_json(c.to_json()).singular_trials == c.singular_trials


def test_zero_gradients_are_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x = torch.randn(6, 20)
    x[4] = 0
    with pytest.raises(RankDeficientError, match=r"samples \[4\] have zero gradient"):
        log_determinant(factored_gram(Gated(), x, torch.tensor([0, 1, 2, 0, 1, 2])))


def test_more_samples_than_parameters() -> None:
    with pytest.raises(FlatminimaError, match="exceeds the model's 6 trainable parameters"):
        fm.measure(nn.Linear(2, 2), (torch.randn(50, 2), torch.zeros(50).long()), subset_size=10)


def test_linear_dependence_without_duplicates() -> None:
    """Three classes, three features, no bias: rank at most 2 · 3 = 6 (a sample's logit gradient sums to zero)."""
    model = nn.Linear(3, 3, bias=False).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    with pytest.raises(RankDeficientError, match=r"rank 6 of 8.*linearly dependent"):
        log_determinant(factored_gram(model, x, y))


def test_nan_in_weights_and_in_logits() -> None:
    model, x, y = minimum()
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"parameter '0\.weight'"):
        fm.measure(broken, (x, y), **whole())
    x[5] = math.inf
    with pytest.raises(NonFiniteError, match=r"first: \[5\]"):
        fm.measure(model, (x, y), **whole())


def test_too_high_a_loss_is_warned_of() -> None:
    model, x, y = minimum()
    model[-1].weight.data.normal_()
    with pytest.warns(NotAMinimumWarning, match="too far from a minimum"):
        fm.measure(model, (x, y), subset_size=10, trials=2)


def test_generic_path_is_warned_of_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, CLASSES))
    x, y = torch.randn(40, 6), torch.arange(40) % CLASSES
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        c = fm.measure(model, (x, y), subset_size=10, trials=3)
    assert [w.category for w in caught].count(GenericPathWarning) == 1
    assert len(c.settings.generic_parameters) == 2


def test_interacting_samples_are_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h - h.mean(0)

    with pytest.raises(WrongGradientError, match="interact"):
        fm.gram(Mixing(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))


def test_time_does_not_pass_for_samples_in_time_first_models() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))

    model, x, y = TimeFirst().double(), torch.randn(5, 5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(fm.gram(model, x, y), explicit_gram(model, x, y), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchnorm": "train"}, "unknown batchnorm"),
        ({"on_singular": "ignore"}, "unknown on_singular"),
        ({"subset_size": 100}, "60 samples, fewer than subset_size=100"),
        ({"trials": 0}, "at least 1"),
        ({"robustness_samples": -1}, "robustness_samples"),
        ({"loss": "hinge"}, "unknown loss"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    model, x, y = minimum()
    with pytest.raises(FlatminimaError, match=message):
        fm.measure(model, (x, y), **{"subset_size": 10, "trials": 2, **options})


def test_half_precision_and_frozen_models_are_refused() -> None:
    model, x, y = minimum()
    with pytest.raises(FlatminimaError, match="float32 and float64"):
        fm.gram(copy.deepcopy(model).bfloat16(), x.bfloat16(), y)
    with pytest.raises(FlatminimaError, match="no trainable parameter"):
        fm.gram(model.requires_grad_(False), x, y)


def test_wrong_class_count() -> None:
    model, x, y = minimum()
    with pytest.raises(FlatminimaError, match="the model has 4 outputs"):
        fm.measure(model, (x, y + 2), **whole())


# --- comparing -------------------------------------------------------------------------------------------------------


def test_compare_pairs_the_same_subsets() -> None:
    model, x, y = minimum()
    other = copy.deepcopy(model)
    other[0].weight.data *= 1.001
    options = {"subset_size": 12, "trials": 5, "seed": 4}
    comparison = fm.compare({"a": model, "b": other}, (x, y), **options)
    a, b = (fm.measure(m, (x, y), **options) for m in (model, other))
    differences = [p - q for p, q in zip(a.log_det_fisher.per_trial, b.log_det_fisher.per_trial, strict=True)]
    difference = comparison.difference("a", "b")
    assert difference == Estimate.of(differences)
    assert difference.standard_error < a.log_det_fisher.standard_error / 10
    assert comparison.ranks() == ({"a": 1, "b": 2} if difference.mean < 0 else {"b": 1, "a": 2})
    assert "rank 1" in str(comparison)
    with pytest.raises(FlatminimaError, match="no model named 'c'"):
        comparison.difference("a", "c")
    with pytest.raises(FlatminimaError, match="no measure 'sharpness'"):
        comparison.difference("a", "b", "sharpness")


class Counted:
    """Samples, and what was fetched of them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.fetched = x, y, []

    def __len__(self) -> int:
        return len(self.y)

    def fetch(self, indices: list[int] | range) -> tuple[Tensor, Tensor]:
        self.fetched.append(list(indices))
        return self.x[list(indices)], self.y[list(indices)]


class Overwriting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(1.01))


def test_compared_models_share_what_is_fetched_and_none_sees_what_another_does_to_it() -> None:
    model, x, y = minimum()
    models = {"a": model, "writes": Overwriting(copy.deepcopy(model)), "b": copy.deepcopy(model)}
    options = {"subset_size": 10, "trials": 3, "progress": False}
    alone, together = Counted(x, y), Counted(x, y)

    def spoil(trial: Any) -> float:
        trial.inputs.zero_()
        return 0.0

    expected = fm.measure(model, alone, **options)
    found = fm.compare(models, together, measures=("paper", spoil), **options).characterizations
    assert together.fetched == alone.fetched
    assert found["a"].log_det_fisher == found["b"].log_det_fisher == expected.log_det_fisher
    assert found["b"].train_loss == expected.train_loss != found["writes"].train_loss


def test_compare_warns_of_unequal_losses_and_names_the_model_that_fails() -> None:
    model, x, y = minimum()
    sharper = copy.deepcopy(model)
    sharper[-1].weight.data *= 2
    with pytest.warns(UnequalLossWarning, match="training losses differ"):
        fm.compare({"a": model, "b": sharper}, (x, y), subset_size=10, trials=2)
    sharper[-1].weight.data *= math.nan
    with pytest.raises(NonFiniteError, match=r"^b: NaN"):
        fm.compare({"a": model, "b": sharper}, (x, y), subset_size=10, trials=2)
    with pytest.raises(FlatminimaError, match="at least two models"):
        fm.compare({"a": model}, (x, y))


def test_logit_normalization_removes_the_scale_of_the_logits() -> None:
    """Twice the head: the logits double, the training loss falls by decades, the normalized loss does not move."""
    model, x, y = minimum()
    other = copy.deepcopy(model)
    other[-1].weight.data *= 2
    options = {"subset_size": 12, "trials": 3, "logit_normalization": 0.04}
    comparison = fm.compare({"a": model, "b": other}, (x, y), **options)
    plain = fm.measure(model, (x, y), subset_size=12, trials=3)
    a, b = comparison.characterizations.values()
    assert b.train_loss < a.train_loss / 100
    # Rows of the head halve (its input is the same, the gradient at the logits is half); those of the body stay.
    assert 0 < a.log_det_fisher.mean - b.log_det_fisher.mean < 2 * 12 * math.log(2)
    assert plain.train_loss == a.train_loss
    assert plain.log_det_fisher != a.log_det_fisher


# --- variants --------------------------------------------------------------------------------------------------------


def test_batch_statistics_equal_autograd_on_chunks() -> None:
    """Each sample's loss, with BatchNorm normalizing its chunk of 4, differentiated on its own."""
    model, x, y = minimum(sharpness=2.0)
    x, y = x[:12], y[:12]
    running = model[1].running_mean.clone()
    reference = copy.deepcopy(model).eval()
    reference[1].train()
    rows = []
    for i in range(12):
        chunk = slice(i // 4 * 4, i // 4 * 4 + 4)
        loss = nn.functional.cross_entropy(reference(x[chunk])[i % 4 : i % 4 + 1], y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(reference.parameters()))]))
    jacobian = torch.stack(rows)
    result = factored_gram(model, x, y, batchnorm=4)
    torch.testing.assert_close(result.matrix(), jacobian @ jacobian.T, rtol=1e-8, atol=1e-12)
    assert torch.equal(model[1].running_mean, running)
    assert model[1].track_running_stats
    with pytest.raises(FlatminimaError, match="divide the subset_size"):
        factored_gram(model, x, y, batchnorm=5)
    c = fm.measure(model, (x, y), subset_size=8, trials=2, batchnorm=4)
    assert c.settings.batchnorm == 4


def test_scale_invariance_under_rescaling_of_relu_and_batchnorm_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, CLASSES),
    ).double()
    x, y = torch.randn(30, 3, 6, 6, dtype=torch.float64), torch.arange(30) % CLASSES
    with torch.no_grad():
        for _ in range(20):
            model.train()(x)
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        rescaled[3].weight *= 7
        rescaled[3].bias *= 7
        rescaled[6].weight /= 7
        rescaled[0].weight *= 3  # undone by BatchNorm, whose statistics follow
        rescaled[0].bias *= 3
        rescaled[1].running_mean *= 3
        rescaled[1].running_var *= 9
        rescaled[1].eps = 9 * model[1].eps
    model.eval(), rescaled.eval()
    torch.testing.assert_close(model(x), rescaled(x))
    ours, theirs = (log_determinant(factored_gram(m, x, y, scale_invariant=True)) for m in (model, rescaled))
    assert ours == pytest.approx(theirs, rel=1e-9)
    plain, changed = (log_determinant(factored_gram(m, x, y)) for m in (model, rescaled))
    assert abs(plain - changed) > 1


def test_scale_invariant_gram_by_its_definition() -> None:
    model, x, y = minimum(sharpness=2.0)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).abs()
    jacobian = explicit_jacobian(model, x[:9], y[:9]) * weights
    result = factored_gram(model, x[:9], y[:9], scale_invariant=True)
    torch.testing.assert_close(result.matrix(), jacobian @ jacobian.T, rtol=1e-8, atol=1e-14)


def test_shares_add_up_and_round_trip() -> None:
    model, x, y = minimum(sharpness=2.0)
    c = fm.measure(model, (x, y), subset_size=10, trials=3, per_parameter=True)
    assert c.shares is not None
    assert c.shares.keys() == dict(model.named_parameters()).keys()
    total = sum(share.fisher_trace.mean for share in c.shares.values())
    assert total == pytest.approx(c.fisher_trace.mean, rel=1e-9)
    assert c.shares["1.bias"].log_det is None  # 8 entries, 10 samples
    assert c.shares["1.bias"].rank == 8
    head = c.shares["5.weight"]
    assert head.log_det is not None
    assert head.log_det.mean < c.log_det_fisher.mean
    assert Characterization.from_json(c.to_json()) == c


def test_trials_stop_at_the_standard_error_asked_for() -> None:
    model, x, y = minimum()
    everything = fm.measure(model, (x, y), subset_size=12, trials=40, measures=())
    target = everything.log_det_fisher.standard_error * 2
    c = fm.measure(model, (x, y), subset_size=12, trials=40, measures=(), max_standard_error=target)
    done = c.settings.trials
    assert 5 <= done < 40
    assert c.log_det_fisher.standard_error <= target
    assert c.log_det_fisher.per_trial == everything.log_det_fisher.per_trial[:done]
    before = Estimate.of(everything.log_det_fisher.per_trial[: done - 1]).standard_error
    assert before > target or done == 5
    with pytest.raises(FlatminimaError, match="max_standard_error must be positive"):
        fm.measure(model, (x, y), subset_size=12, trials=40, max_standard_error=0)


def test_comparisons_stop_at_the_standard_error_of_their_differences() -> None:
    """Of all three pairs, which is far below that of either mean; what is done is what all trials begin with."""
    model, x, y = minimum()
    models = {"a": model, "b": copy.deepcopy(model), "c": copy.deepcopy(model)}
    models["b"][0].weight.data *= 1.001
    models["c"][5].weight.data += 1e-3 * torch.randn_like(models["c"][5].weight)
    options = {"subset_size": 12, "measures": (), "trials": 30}
    everything = fm.compare(models, (x, y), **options)
    per_trial = {name: c.log_det_fisher.per_trial for name, c in everything.characterizations.items()}
    pairs = list(itertools.combinations(models, 2))

    def error(first: str, second: str, trials: int) -> float:
        differences = [p - q for p, q in zip(per_trial[first], per_trial[second], strict=True)]
        return torch.tensor(differences[:trials]).std().item() / math.sqrt(trials)

    widest = [max(error(*pair, trials) for pair in pairs) for trials in range(5, 31)]
    target = 1.0001 * widest[12]
    due = 5 + next(i for i, value in enumerate(widest) if value <= target)
    assert 5 < due < 30
    c = fm.compare(models, (x, y), max_standard_error=target, **options)
    for name, characterization in c.characterizations.items():
        assert characterization.settings.trials == due
        assert characterization.log_det_fisher.per_trial == per_trial[name][:due]
        assert characterization.log_det_fisher.standard_error > target
    assert max(c.difference(*pair).standard_error for pair in pairs) <= target


def test_a_difference_without_a_common_trial_is_nan() -> None:
    model, x, y = minimum()
    c = fm.measure(model, (x, y), subset_size=12, trials=2)
    a, b = ((values, math.nan)[::order] for values, order in ((1.0, 1), (2.0, -1)))
    minima = {name: dataclasses.replace(c, log_det_fisher=Estimate.of(v)) for name, v in (("a", a), ("b", b))}
    assert math.isnan(comparison_of(minima).difference("a", "b").mean)


def test_ranks_are_by_the_trials_that_all_have_as_differences_are() -> None:
    model, x, y = minimum()
    c = fm.measure(model, (x, y), subset_size=12, trials=2)
    values = {"a": (1.0, 1.0, -9.0, -9.0), "b": (0.0, 0.0)}
    minima = {name: dataclasses.replace(c, log_det_fisher=Estimate.of(found)) for name, found in values.items()}
    comparison = comparison_of(minima)
    assert comparison.ranks() == {"b": 1, "a": 2}
    assert comparison.difference("a", "b").mean == 1
    minima["c"] = dataclasses.replace(c, log_det_fisher=Estimate.of((math.nan, math.nan, 5.0)))
    assert comparison_of(minima).ranks() == {}


def test_minima_measured_by_different_losses_of_one_name_do_not_compare() -> None:
    model, x, y = minimum()

    def weighted(factor: float) -> Loss:
        return lambda logits, targets: factor * F.cross_entropy(logits, targets, reduction="none")

    def measured(loss: Loss) -> fm.Characterization:
        return fm.measure(model, (x, y), loss=loss, subset_size=12, trials=2, measures=())

    smoothed, weighed = ([measured(kind(value)) for value in (0.1, 0.1, 0.2)] for kind in (CrossEntropy, weighted))
    for one, same, other in (smoothed, weighed):
        assert one.settings.loss == other.settings.loss
        assert comparison_of({"a": one, "b": same}).difference("a", "b").mean == 0
        with pytest.raises(FlatminimaError, match=r"'a' and 'b': loss .* and .*\): measure all with the same data"):
            comparison_of({"a": one, "b": other})
    with pytest.raises(FlatminimaError, match=r"CrossEntropy\(label_smoothing=0.1,.*label_smoothing=0.2"):
        comparison_of({"a": smoothed[0], "b": smoothed[2]})
    comparison_of({"name": measured("cross_entropy"), "instance": measured(CrossEntropy())})


def test_of_a_minimum_that_an_earlier_version_measured_the_losses_name_decides() -> None:
    model, x, y = minimum()
    of_loss = {}
    for loss in ("cross_entropy", CrossEntropy(0.1)):
        c = fm.measure(model, (x, y), loss=loss, subset_size=12, trials=2, measures=())
        values = json.loads(c.to_json())
        del values["settings"]["loss_form"]
        earlier = fm.Characterization.from_json(json.dumps({**values, "schema": 1}))
        assert earlier.settings.loss_form is None
        assert comparison_of({"a": earlier, "b": c}).difference("a", "b").mean == 0
        of_loss[c.settings.loss] = earlier
    with pytest.raises(FlatminimaError, match="loss cross_entropy and CrossEntropy"):
        comparison_of(of_loss)


def test_comparing_takes_the_options_of_measuring() -> None:
    model, x, y = minimum()
    with pytest.raises(TypeError, match="unexpected keyword argument 'subset'"):
        fm.compare({"a": model, "b": model}, (x, y), subset=12)


def test_minima_measured_on_different_numbers_of_trials_are_paired_as_far_as_both_go() -> None:
    model, x, y = minimum()
    long, short = (fm.measure(model, (x, y), subset_size=12, trials=t) for t in (5, 3))
    comparison = comparison_of({"long": long, "short": short})
    assert comparison.difference("long", "short").per_trial == (0, 0, 0)


def test_numbers_that_json_lacks_become_null() -> None:
    values = {"a": (1.5, math.nan), "b": [{"c": math.inf, "d": True}], "e": "NaN", "f": None}
    assert json.loads(json.dumps(jsonable(values), allow_nan=False)) == {
        "a": [1.5, None],
        "b": [{"c": None, "d": True}],
        "e": "NaN",
        "f": None,
    }


def test_the_generic_path_gives_the_same_and_says_which_parameters_took_it() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(20, 3).double(), torch.randn(30, 20, dtype=torch.float64), torch.arange(30) % 3
    how: dict[str, Any] = {"subset_size": 8, "trials": 3, "measures": ()}
    with pytest.warns(NotAMinimumWarning):
        by_rules = fm.measure(model, (x, y), **how)
    with pytest.warns(NotAMinimumWarning):
        generic = fm.measure(model, (x, y), path="generic", **how)
    assert generic.log_det_fisher.per_trial == pytest.approx(by_rules.log_det_fisher.per_trial, rel=1e-12)
    assert (by_rules.settings.generic_parameters, generic.settings.generic_parameters) == ([], ["weight", "bias"])
    with pytest.raises(FlatminimaError, match="path='fast'"):
        fm.measure(model, (x, y), path="fast", **how)  # type: ignore[arg-type]
