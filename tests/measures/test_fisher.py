from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, RankDeficientError
from flatminima.exact import exact_fisher, exact_gamma
from flatminima.gramian.engine import factored_gram
from flatminima.gramian.factored import FactoredGram, log_determinant
from flatminima.losses import CrossEntropy
from flatminima.measures.comparison import comparison_of
from flatminima.measures.fisher import FisherRows
from flatminima.theory import gamma_of
from support.cases import CASES, N
from support.small_networks import PinnedLinear, pinned_linear

SMOOTHED = CrossEntropy(label_smoothing=0.1)


def gram_of(fisher, model: nn.Module, inputs, targets: Tensor, loss="cross_entropy", **options) -> FactoredGram:
    rows = FisherRows.of(fisher, loss, model, inputs)
    return factored_gram(model, *rows.of_batch(inputs, targets), loss=rows.loss, **options)


def smoothed(targets: Tensor, classes: int) -> Tensor:
    return 0.9 * F.one_hot(targets, classes).double() + 0.1 / classes


def minimum(classes: int, loss: float = 0.01) -> tuple[nn.Module, Tensor, Tensor]:
    """A tanh network in float32 whose head points along its features' class means, as far as the training loss says."""
    torch.manual_seed(0)
    y = torch.arange(10 * classes) % classes
    x = 2 * torch.randn(classes, 30)[y] + 0.7 * torch.randn(len(y), 30)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, classes))
    with torch.no_grad():
        features = model[1](model[0](x))
        means = torch.stack([features[y == c].mean(0) for c in range(classes)])
        means -= means.mean(0)
        model[2].bias.zero_()
        low, high = 1e-2, 1e3
        for _ in range(50):  # bisect the head's scale
            scale = (low * high) ** 0.5
            model[2].weight.copy_(scale * means)
            found = CrossEntropy()(model(x), y).mean().item()
            low, high = (scale, high) if found > loss else (low, scale)
    assert found == pytest.approx(loss, rel=0.01)
    return model, x, y


# --- rows at the logits ----------------------------------------------------------------------------------------------


def factor(logits: Tensor, label: int, fisher: str) -> tuple[Tensor, Tensor]:
    """Directions (K − 1, K) and log-norms (K − 1,) of one sample's rows."""
    rows = FisherRows.of(fisher, SMOOTHED, nn.Identity(), logits[None])
    result = rows.loss.gradient(*rows.of_batch(logits[None], torch.tensor([label])))
    return result.direction, result.log_norm


def products(logits: Tensor, label: int, fisher: str):
    """A of Eq. 2 in the arithmetic of mpmath."""
    K = len(logits)
    weights = [mp.e ** mp.mpf(z) for z in logits.tolist()]
    p = [w / sum(weights) for w in weights]
    y = [mp.mpf(0.1) / K + (1 - mp.mpf(0.1)) * (c == label) for c in range(K)] if fisher == "labels" else p
    minus = [[p[j] - (j == c) for j in range(K)] for c in range(K)]
    return [[sum(y[c] * minus[c][i] * minus[c][j] for c in range(K)) for j in range(K)] for i in range(K)]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 6),
    scale=st.sampled_from([0.1, 1.0, 10.0, 100.0, 1000.0]),
    fisher=st.sampled_from(["labels", "model"]),
)
def test_rows_multiply_to_all_classes_weighted_at_any_confidence(
    seed: int, classes: int, scale: float, fisher: str
) -> None:
    """Right and wrong labels, probabilities down to e^-5000: every entry to a relative 1e-11 of its row and column."""
    mp.dps = 50 + int(8 * scale)
    logits = scale * torch.randn(classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    direction, log_norm = factor(logits, seed % classes, fisher)
    A = products(logits, seed % classes, fisher)
    squares = [mp.e ** (2 * mp.mpf(value)) for value in log_norm.tolist()]
    rows = [[mp.mpf(entry) for entry in row] for row in direction.tolist()]
    for i in range(classes):
        for j in range(classes):
            ours = sum(square * row[i] * row[j] for square, row in zip(squares, rows, strict=True))
            assert abs(ours - A[i][j]) <= 1e-11 * mp.sqrt(A[i][i] * A[j][j])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 30), scale=st.floats(0.1, 1000))
def test_rows_of_the_model_are_well_conditioned(seed: int, classes: int, scale: float) -> None:
    logits = scale * torch.randn(classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    direction, _ = factor(logits, seed % classes, "model")
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(classes - 1, dtype=torch.float64))
    assert torch.linalg.eigvalsh(direction @ direction.T)[0] > 1 / classes**2


# --- ξ ---------------------------------------------------------------------------------------------------------------


SMALL = ["linear", "conv2d strided", "tied embedding", "frozen", "functional", "two inputs"]


@pytest.mark.parametrize("fisher", ["labels", "model"])
@pytest.mark.parametrize("name", SMALL)
def test_spectrum_is_that_of_the_exact_matrix(name: str, fisher: str) -> None:
    """By layer rules and generic paths alike; ξ and I(w) have the same nonzero eigenvalues."""
    model, inputs, y = next(case for case in CASES if case.name == name).build()
    xi = gram_of(fisher, model, inputs, y, SMOOTHED).matrix()
    assert xi.shape == (N * 4, N * 4)  # K − 1 = 4 rows per sample
    expected = torch.linalg.eigvalsh(exact_fisher(model, inputs, "model" if fisher == "model" else smoothed(y, 5)))
    ours = torch.linalg.eigvalsh(xi / N)
    common = min(len(ours), len(expected))
    torch.testing.assert_close(ours[-common:], expected[-common:], rtol=1e-8, atol=1e-13)


def test_scale_invariance_and_shares() -> None:
    model, x, y = minimum(3)
    model, x = model.double(), x.double()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).abs()
    result = gram_of("model", model, x[:9], y[:9], scale_invariant=True, shares=True)
    information = weights[:, None] * exact_fisher(model, x[:9], "model") * weights
    expected = torch.linalg.eigvalsh(information)[-18:]
    torch.testing.assert_close(torch.linalg.eigvalsh(result.matrix() / 9), expected, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(sum(result.shares.values()), result.unit)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("loss", [1e-2, 1e-4, 1e-6, 1e-9])
def test_float32_agrees_with_float64_at_any_training_loss(classes: int, loss: float) -> None:
    model, x, y = minimum(classes, loss)
    subset = slice(0, 20)
    single = log_determinant(gram_of("model", model, x[subset], y[subset]))
    xi = gram_of("model", copy.deepcopy(model).double(), x[subset].double(), y[subset])
    assert len(xi.unit) == 20 * (classes - 1)
    assert single == pytest.approx(log_determinant(xi), abs=1e-3)


def test_of_two_classes_it_is_a_known_multiple_of_the_empirical_one() -> None:
    """p(1 − p) over (1 − p)²: p_y / (1 − p_y) for every sample."""
    model, x, y = minimum(2)
    model, x = model.double(), x.double()
    exact, empirical = (log_determinant(gram_of(fisher, model, x, y)) for fisher in ("model", "empirical"))
    losses = CrossEntropy()(model(x), y)
    assert exact - empirical == pytest.approx(-losses.expm1().log().sum().item(), rel=1e-9)


# --- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["labels", "model"])
def test_every_measure_by_its_definition(fisher) -> None:
    model, x, y = minimum(3)
    model, x = model.double(), x.double()
    n = len(y)
    c = fm.measure(model, (x, y), loss=SMOOTHED, fisher=fisher, subset_size=n, trials=1)
    per_sample = ["model"] * n if fisher == "model" else smoothed(y, 3).split(1)
    information = exact_fisher(model, x, "model" if fisher == "model" else smoothed(y, 3))
    eigenvalues = torch.linalg.eigvalsh(information * n)[-2 * n :]
    assert c.log_det_fisher.mean == pytest.approx(eigenvalues.log().sum().item(), rel=1e-9)
    assert c.spectral_radius.mean == pytest.approx(eigenvalues[-1].item(), rel=1e-9)
    assert c.fisher_trace.mean == pytest.approx(information.trace().item(), rel=1e-9)
    assert c.fisher_frobenius_norm.mean == pytest.approx(information.square().sum().item(), rel=1e-9)
    of_sample = [exact_fisher(model, one, label) for one, label in zip(x.split(1), per_sample, strict=True)]
    assert c.frobenius_norm.mean == pytest.approx(sum(one.square().sum().item() for one in of_sample) / n, rel=1e-9)
    assert c.spectrum == pytest.approx(eigenvalues.flip(0).tolist(), rel=1e-8)
    assert c.settings.fisher == fisher
    assert f"exact Fisher by {fisher}" in " ".join(str(c).split())
    assert fm.Characterization.from_json(c.to_json()) == c


def test_labels_without_smoothing_are_one_hot() -> None:
    model, x, y = minimum(4)
    one_hot, plain = (fm.measure(model, (x, y), fisher=f, subset_size=10, trials=2) for f in ("labels", "empirical"))
    assert dataclasses.replace(one_hot, settings=plain.settings) == plain


def test_a_small_memory_budget_changes_nothing() -> None:
    model, x, y = minimum(4)
    model, x = model.double(), x.double()
    options = {"fisher": "model", "subset_size": 10, "trials": 2, "per_parameter": True}
    roomy = fm.measure(model, (x, y), **options)
    tight = fm.measure(model, (x, y), memory_budget=200_000, **options)
    assert tight.log_det_fisher.mean == pytest.approx(roomy.log_det_fisher.mean, rel=1e-10)
    shares = sum(share.fisher_trace.mean for share in roomy.shares.values())
    assert shares == pytest.approx(roomy.fisher_trace.mean, rel=1e-9)


def test_different_fishers_do_not_compare() -> None:
    model, x, y = minimum(3)
    one, other = (fm.measure(model, (x, y), fisher=f, subset_size=8, trials=2) for f in ("model", "empirical"))
    with pytest.raises(FlatminimaError, match="same data, subset_size, seed, loss, fisher"):
        comparison_of({"one": one, "other": other})


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_gamma_of_all_samples_is_exact() -> None:
    """Drawn whole from W/r samples, J is square: γ follows from γ̂ without a bias."""
    torch.manual_seed(0)
    model, x = pinned_linear(4)
    assert isinstance(model, PinnedLinear)  # of 8 parameters and 3 classes: 4 samples have 8 rows
    c = fm.measure(model, (x, torch.tensor([0, 1, 2, 0])), fisher="model", subset_size=4, trials=1)
    assert gamma_of(c) == pytest.approx(exact_gamma(model, x, "model"), rel=1e-9)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_singular_matrix_names_samples_not_rows() -> None:
    model, x, y = minimum(4)
    model, x = model.double(), x.double()
    x[7] = x[3]
    with pytest.raises(RankDeficientError, match=r"rank 117 of 120\): samples (3 and 7|7 and 3) have"):
        fm.measure(model, (x, y), fisher="model", subset_size=40, trials=1)
    bare = nn.Linear(30, 4, bias=False).double()
    x[5] = 0
    with pytest.raises(RankDeficientError, match=r"samples \[5\] have zero gradient"):
        log_determinant(gram_of("model", bare, x[:6], y[:6]), FisherRows(3, "cross_entropy").names(range(6)))
    rank = torch.randn(8, 3, dtype=torch.float64)  # 9 parameters, of which 6 count, and 16 rows
    with pytest.raises(RankDeficientError, match=r"rank 6 of 16.*linearly dependent"):
        log_determinant(gram_of("model", nn.Linear(3, 3, bias=False).double(), rank, torch.arange(8) % 3), range(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "one-hot"}, "unknown fisher='one-hot'"),
        ({"loss": CrossEntropy(weight=(1.0, 2.0, 1.0))}, "no class weights"),
        ({"loss": lambda z, y: F.cross_entropy(z, y, reduction="none")}, "one label per sample"),
        ({"logit_normalization": 0.04}, "leave batchnorm and logit_normalization out"),
        ({"batchnorm": 2}, "leave batchnorm and logit_normalization out"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    model, x, y = minimum(3)
    with pytest.raises(FlatminimaError, match=message):
        fm.measure(model, (x, y), **{"fisher": "model", "subset_size": 8, "trials": 1, **options})


def test_more_rows_than_parameters() -> None:
    _, x, y = minimum(10)
    with pytest.raises(FlatminimaError, match=r"times 9 rows per sample .* lower subset_size to at most 34"):
        fm.measure(nn.Linear(30, 10), (x, y), fisher="model", subset_size=35)


def test_tokens_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    tokens = torch.randint(0, 11, (20, 5))
    with pytest.raises(FlatminimaError, match="one label per sample"):
        fm.measure(model, (tokens, tokens), loss=CrossEntropy(next_token=True), fisher="model", subset_size=4)


def test_rows_of_one_sample_do_not_pass_for_duplicates() -> None:
    """Two classes whose logits move alike make a sample's own rows dependent: no other sample is to blame."""

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            return torch.cat([z, 0 * z, 2 * z], 1)

    x, y = torch.randn(6, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(RankDeficientError, match=r"rank 6 of 12.*linearly dependent"):
        log_determinant(gram_of("model", Alike().double(), x, y), FisherRows(2, "cross_entropy").names(range(6)))
    assert math.isfinite(log_determinant(gram_of("empirical", Alike().double(), x, y)))


class Scaled(nn.Module):
    """Of a mapping, one of whose tensors has no dimensions, with things beside it that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor, scale: Tensor, names: list[str]) -> Tensor:
        assert len(names) == len(x)
        logits: Tensor = scale * self.linear(x)
        return logits


def test_constants_and_what_is_no_tensor_stay_beside_the_exact_rows() -> None:
    torch.manual_seed(0)
    model, x, y = Scaled(), torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    inputs = {"x": x, "scale": torch.tensor(0.5, dtype=torch.float64), "names": list("abcde")}
    plain = nn.Linear(6, 3, dtype=torch.float64)
    plain.load_state_dict(model.linear.state_dict())
    scaled = nn.Sequential(plain, Half())
    expected, found = gram_of("model", scaled, x, y), gram_of("model", model, inputs, y)
    torch.testing.assert_close(found.matrix(), expected.matrix(), rtol=1e-10, atol=1e-14)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_targets_of_two_dimensions_are_refused_in_one_line() -> None:
    model, x, y = minimum(3)
    with pytest.raises(FlatminimaError, match=r"targets of shape \(8, 1\) are no class indices for the exact Fisher"):
        fm.measure(model, (x, y[:, None]), fisher="model", subset_size=8, trials=2)
