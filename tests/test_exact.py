from __future__ import annotations

import copy
import math
import threading
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from flatminima.errors import (
    FlatminimaError,
    NonFiniteError,
    RankDeficientError,
    UndefinedMeasureError,
    WrongGradientError,
)
from flatminima.exact import MAX_PARAMETERS, exact_fisher, exact_gamma, exact_hessian
from flatminima.network.batches import call_model, map_tensors
from support.cases import CASES
from support.once_differentiable import DifferentiableOnce
from support.oracles import explicit_jacobian
from support.small_networks import PinnedLinear, PinnedNetwork, divergence, pinned_linear, trained_network

BY_NAME = {case.name: case for case in CASES}
SMALL = [
    "linear",
    "conv2d strided",
    "batchnorm on features",
    "tied embedding",
    "branched, dead and unused",
    "frozen",
    "functional",
    "vision transformer",
    "language by keyword",
    "two inputs",
    "recurrent",
]


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def smoothed(y: Tensor, classes: int) -> Tensor:
    return 0.8 * F.one_hot(y, classes).double() + 0.2 / classes


@pytest.mark.parametrize("name", SMALL)
def test_one_hot_fisher_is_the_jacobians_square(name: str) -> None:
    """Eq. 4: I = (1/N) JᵀJ."""
    model, inputs, y = BY_NAME[name].build()
    J = explicit_jacobian(model, inputs, y)
    assert relative_difference(exact_fisher(model, inputs, y), J.T @ J / len(y)) < 1e-12


@pytest.mark.parametrize("name", SMALL)
def test_fisher_weighs_all_classes(name: str) -> None:
    """Eq. 2 as it stands, and with the model's probabilities J_zᵀ (diag p − ppᵀ) J_z."""
    model, inputs, y = BY_NAME[name].build()
    N, K = len(y), 5
    weights = torch.rand(N, K, dtype=torch.float64).softmax(1)
    given_labels, own_labels = 0.0, 0.0
    of_class = [explicit_jacobian(model, inputs, torch.full_like(y, i)) for i in range(K)]
    of_logit = [explicit_jacobian(model, inputs, y, loss=lambda z, _, i=i: z[:, i]) for i in range(K)]
    p = call_model(model.eval(), inputs).detach().softmax(1)
    for i in range(K):
        given_labels += of_class[i].T @ (weights[:, i, None] * of_class[i]) / N
        own_labels += of_logit[i].T @ (p[:, i, None] * of_logit[i]) / N
        for j in range(K):
            own_labels -= of_logit[i].T @ ((p[:, i] * p[:, j])[:, None] * of_logit[j]) / N
    assert relative_difference(exact_fisher(model, inputs, weights), given_labels) < 1e-12
    assert relative_difference(exact_fisher(model, inputs, "model"), own_labels) < 1e-12


@pytest.mark.parametrize("name", SMALL)
def test_hessian_is_that_of_the_mean_loss(name: str) -> None:
    model, inputs, y = BY_NAME[name].build()
    model.eval()
    inputs, y = map_tensors(lambda tensor: tensor[:2], inputs), y[:2]
    labels = smoothed(y, 5)
    parameters = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {key: part.view(shape) for key, part, shape in zip(parameters, parts, shapes, strict=True)}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = torch.func.functional_call(model, values, args, kwargs)
        return F.cross_entropy(getattr(output, "logits", output), labels)

    flat = torch.cat([p.flatten() for p in parameters.values()])
    gradient, hessian = torch.func.grad(loss), exact_hessian(model, inputs, labels)
    moving = gradient(flat) != 0  # an embedding's padding row has an effect but, by definition, no gradient
    step = 1e-5
    for direction in torch.randn(3, len(flat), dtype=torch.float64) * moving:
        expected = (gradient(flat + step * direction) - gradient(flat - step * direction)) / (2 * step)
        assert relative_difference(hessian @ direction, expected) < 1e-6


def test_hessian_of_a_model_with_a_compiled_part() -> None:
    torch.manual_seed(0)
    part, last = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 3)
    plain = nn.Sequential(part, last).double()
    compiled = nn.Sequential(torch.compile(part, backend="aot_eager"), last)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    compiled(x)  # once compiled
    assert torch.equal(exact_hessian(compiled, x, y), exact_hessian(plain, x, y))


class Remembering(nn.Module):
    """Keeps activations with their graph, as many do for a look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.first(x))
        self.kept = {"by layer": [self.features]}
        return self.last(self.features)


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


@pytest.mark.parametrize("build", [Remembering, _pruned])
def test_what_an_earlier_pass_has_left_in_the_model_is_no_obstacle(build: Any) -> None:
    torch.manual_seed(0)
    model = build().double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    parameters = list(model.parameters())
    rows = []
    for i in range(5):
        gradient = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        rows.append(torch.cat([part.flatten() for part in gradient]))
    J = torch.stack(rows)
    held = {name: id(value) for name, value in vars(model if build is Remembering else model[0]).items()}
    assert relative_difference(exact_fisher(model, x, y), J.T @ J / 5) < 1e-12
    assert relative_difference(exact_hessian(model, x, "model"), exact_fisher(model, x, "model")) < 1e-12  # Eq. 1
    assert held == {name: id(value) for name, value in vars(model if build is Remembering else model[0]).items()}


def test_hessian_of_many_samples_is_one_mean() -> None:
    """More samples than one chunk holds: repeating the data changes nothing."""
    model, x = pinned_linear(100)
    y = x[:, :2].argmax(1)
    repeated = exact_hessian(model, x.repeat(6, 1), y.repeat(6))
    assert relative_difference(repeated, exact_hessian(model, x, y)) < 1e-12


def test_a_function_linear_in_its_parameters_has_no_second_derivative() -> None:
    """The loss of a constant logit, whose gradient does not depend on the parameters' values."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.unused.sum()

    hessian = exact_hessian(Constant(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(hessian, torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["conv2d same size", "vision transformer", "recurrent"])
def test_hessian_is_fisher_where_the_model_gives_the_labels(name: str) -> None:
    """Eq. 1, at a minimum that is exact: the labels are the model's own probabilities."""
    model, inputs, _ = BY_NAME[name].build()
    inputs = inputs[:2]  # the second derivatives cost as much for every sample
    own = call_model(model.eval(), inputs).detach().softmax(1)
    hessian = exact_hessian(model, inputs, own)
    assert relative_difference(exact_fisher(model, inputs, own), hessian) < 1e-12
    assert relative_difference(exact_hessian(model, inputs, "model"), hessian) < 1e-12


def test_hessian_is_fisher_at_a_trained_label_smoothed_minimum() -> None:
    """Eq. 1: the difference is of the order of p − y, the root of the divergence; Eq. 4's labels do not obey it."""
    model, x, y = trained_network(37)
    kl = divergence(model, x, y)
    assert kl < 1e-4
    assert relative_difference(exact_fisher(model, x, y), exact_hessian(model, x, y)) < math.sqrt(kl)
    assert relative_difference(exact_fisher(model, x, y.argmax(1)), exact_hessian(model, x, y.argmax(1))) > 0.3


def test_hessian_is_not_fisher_away_from_a_minimum() -> None:
    torch.manual_seed(0)
    model, x = PinnedNetwork().double(), torch.randn(37, 4, dtype=torch.float64)
    y = smoothed(torch.arange(37) % 3, 3)
    assert relative_difference(exact_fisher(model, x, y), exact_hessian(model, x, y)) > 0.1


def test_one_hot_labels_of_two_classes_give_less_by_the_odds() -> None:
    """Per sample, Eq. 4 is (1 − p_y)/p_y times Eq. 2 with y = f_w(x)."""
    model, x = pinned_linear(1, classes=2)
    y = model(x).argmax(1)
    p = model(x).softmax(1).max().item()
    one_hot, own = exact_fisher(model, x, y), exact_fisher(model, x, "model")
    assert torch.allclose(one_hot, (1 - p) / p * own, rtol=1e-12, atol=0)


def test_gamma_is_the_log_determinant() -> None:
    model, x, y = trained_network(74)
    labels: dict[str, Any] = {"classes": y.argmax(1), "distributions": y, "model": "model"}
    for name, chosen in labels.items():
        expected = torch.linalg.slogdet(exact_fisher(model, x, chosen)).logabsdet.item()
        assert exact_gamma(model, x, chosen) == pytest.approx(expected, rel=1e-6), name


def test_gamma_where_the_matrix_itself_has_lost_its_digits() -> None:
    """Two columns alike to 1e-9, parameters of unlike scale, det below 1e-308 and p_y − 1 of 1e-13, in 60 digits."""
    torch.manual_seed(0)
    x = torch.randn(12, 3, dtype=torch.float64)
    x[:, 2] = 1 + 1e-9 * x[:, 2]  # nearly the bias's column: squared, a condition number of 1e18
    model = PinnedLinear(3, 2).double()
    model.linear.weight.data.zero_()
    model.linear.bias.data.fill_(30)
    with mpmath.workdps(60):
        rest = mpmath.exp(-30) / (1 + mpmath.exp(-30))
        J = mpmath.matrix([[rest * mpmath.mpf(value) for value in (*row, 1.0)] for row in x.tolist()])
        expected = float(mpmath.log(mpmath.det(J.T * J / 12)) - 2 * (200 + 333) * mpmath.log(2))
    scaled = x * torch.tensor([2.0**-200, 2.0**-333, 1.0], dtype=torch.float64)
    assert expected < math.log(1e-308)
    assert exact_gamma(model, scaled, torch.ones(12, dtype=torch.long)) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["one-hot", "model"]))
def test_gamma_is_bounded_by_the_trace(seed: int, kind: str) -> None:
    """Sec. 6: W⁻¹ γ ≤ ln tr I − ln W."""
    model, x = pinned_linear(20, seed=seed)
    labels: Any = model(x).argmax(1) if kind == "one-hot" else "model"
    fisher = exact_fisher(model, x, labels)
    W = len(fisher)
    assert exact_gamma(model, x, labels) / W <= math.log(fisher.trace()) - math.log(W)


def test_the_trace_bound_is_reached_by_a_multiple_of_the_identity() -> None:
    model = PinnedLinear(4, 2).double()
    model.linear.weight.data.zero_()
    model.linear.bias = None
    x = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    fisher = exact_fisher(model, x, "model")
    assert torch.allclose(fisher, torch.eye(4, dtype=torch.float64) / 16, atol=1e-15)
    bound = math.log(fisher.trace()) - math.log(4)
    assert exact_gamma(model, x, "model") / 4 == pytest.approx(bound, rel=1e-12)


def test_free_logits_leave_no_gamma() -> None:
    """A function added to all K logits changes nothing: D + 1 dimensions of K (D + 1) are lost."""
    torch.manual_seed(0)
    with pytest.raises(RankDeficientError, match=r"rank 10 of W = 15.*pin one class's logit"):
        exact_gamma(nn.Linear(4, 3), torch.randn(50, 4), "model")


def test_too_few_samples_leave_no_gamma() -> None:
    model, x = pinned_linear(5)
    with pytest.raises(RankDeficientError, match=r"rank 5 of W = 8.*only 5 gradients"):
        exact_gamma(model, x, model(x).argmax(1))


def test_an_unused_parameter_leaves_no_gamma() -> None:
    model, x = pinned_linear(20)
    model.spare = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(RankDeficientError, match="rank 8 of W = 10"):
        exact_gamma(model, x, "model")


def test_a_float32_model_is_taken_to_float64_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    before = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model).double()
    with torch.no_grad():
        assert torch.equal(exact_fisher(model, x, y), exact_fisher(reference, x.double(), y))
        assert torch.equal(exact_hessian(model, x, y), exact_hessian(reference, x.double(), y))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_large_model_is_refused_with_its_bytes() -> None:
    with pytest.raises(FlatminimaError, match=r"W = 10,100 parameters needs 816,080,000 bytes.*stop at W = 4,096"):
        exact_fisher(nn.Linear(100, 100), torch.randn(2, 100), "model")
    assert MAX_PARAMETERS == 4096


def test_frozen_parameters_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 3))
    model[0].requires_grad_(False)
    assert exact_fisher(model, torch.randn(2, 100), torch.tensor([0, 1])).shape == (303, 303)


@pytest.mark.parametrize("function", [exact_fisher, exact_gamma, exact_hessian])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3, 0]), "run from 0 to 3 but the model has 3 outputs"),
        (torch.tensor([0, -1, 2, 0]), "run from -1 to 2"),
        (torch.rand(4), "neither class indices"),
        (torch.rand(4, 2), "neither class indices"),
        (torch.tensor([[0.5, 0.4, 0.0]] * 4), "sum to one"),
        (torch.tensor([[1.5, -0.5, 0.0]] * 4), "non-negative"),
        (torch.full((4, 3), math.nan), "non-negative"),
        (torch.zeros(5, dtype=torch.long), "share their first dimension"),
        ("own", "unknown labels 'own'"),
        ([0, 1, 2, 0], "labels must be a tensor or 'model', got list"),
        (np.zeros(4, dtype=np.int64), "labels must be a tensor or 'model', got ndarray"),
    ],
)
def test_unsuitable_labels_are_refused(function: Any, labels: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        function(nn.Linear(2, 3), torch.randn(4, 2), labels)


@pytest.mark.parametrize("function", [exact_fisher, exact_gamma, exact_hessian])
def test_other_bad_input_is_refused(function: Any) -> None:
    with pytest.raises(FlatminimaError, match="no samples"):
        function(nn.Linear(2, 3), torch.randn(0, 2), "model")
    with pytest.raises(FlatminimaError, match=r"logits of shape \(N, K ≥ 2\)"):
        function(nn.Linear(2, 1), torch.randn(4, 2), "model")
    with pytest.raises(NonFiniteError, match=r"logits for 1 of 4 samples \(first: \[2\]\)"):
        function(nn.Linear(2, 3), torch.ones(4, 2).index_fill(0, torch.tensor([2]), math.inf), "model")
    broken = nn.Linear(2, 3)
    broken.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="weight"):
        function(broken, torch.randn(4, 2), "model")


@pytest.mark.parametrize("function", [exact_fisher, exact_gamma, exact_hessian])
def test_models_without_a_float64_copy_of_their_own_are_refused(function: Any) -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    with pytest.raises(
        FlatminimaError, match=r"cannot be run on these inputs \(\(4, 5\) float64\): RuntimeError: mat1"
    ):
        function(nn.Linear(2, 3), torch.randn(4, 5), y)
    with pytest.raises(FlatminimaError, match=r"the float64 copy of InFloat32 .* no tensors of a fixed type"):
        function(InFloat32(), x, y)
    uncopied = nn.Linear(2, 3)
    uncopied.lock = threading.Lock()
    with pytest.raises(FlatminimaError, match=r"Linear cannot be copied.*TypeError.*remove what it holds"):
        function(uncopied, x, y)
    replaced = nn.Linear(2, 3).double()
    own = replaced.forward
    replaced.forward = lambda x: 2 * own(x)
    with pytest.raises(FlatminimaError, match="a copy of Linear runs on the weights of the original"):
        function(replaced, x, y)


@pytest.mark.parametrize("function", [exact_fisher, exact_gamma, exact_hessian])
def test_models_with_other_outputs_or_weights_are_refused(function: Any) -> None:
    y = torch.tensor([0, 1, 2, 0])
    by_position = nn.Sequential(nn.Linear(2, 3), nn.Flatten(0, 1))  # N·T rows, of which a label says nothing
    with pytest.raises(FlatminimaError, match=r"for N = 4 samples, the model returned \(20, 3\)"):
        function(by_position, torch.randn(4, 5, 2), y)
    with pytest.raises(FlatminimaError, match=r"'scale' is torch\.complex64: exact forms need real ones"):
        function(ComplexScale(), torch.randn(4, 3), y)


class InFloat32(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class ComplexScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).real


def test_gradients_through_batchnorm_of_one_sample_are_right() -> None:
    """Of a mean over positions, where PyTorch's own are not; those of two samples are."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.norm(x)).transpose(1, 2).mean(1))

    torch.manual_seed(0)
    model, x, y = Positions().double().eval(), torch.randn(5, 4, 6, dtype=torch.float64), torch.arange(5) % 3
    rows = []
    for i in range(5):
        loss = F.cross_entropy(model(x[[i, i]]), y[[i, i]])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    jacobian = torch.stack(rows)
    torch.testing.assert_close(exact_fisher(model, x, y), jacobian.T @ jacobian / 5, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [exact_fisher, exact_hessian])
def test_sparse_gradients_of_an_embedding_are_as_dense_ones(function: Any) -> None:
    def network(*, sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)).double()

    tokens, y = torch.arange(8).view(4, 2) % 5, torch.tensor([0, 1, 2, 0])
    assert torch.equal(function(network(sparse=True), tokens, y), function(network(sparse=False), tokens, y))


@pytest.mark.parametrize("model", [DifferentiableOnce(4, 3), nn.EmbeddingBag(4, 3)], ids=["once", "not implemented"])
def test_a_hessian_that_there_is_not_is_refused(model: nn.Module) -> None:
    x = torch.arange(20).view(5, 4) % 4
    with pytest.raises(UndefinedMeasureError, match="an operation of the model has no second derivative"):
        exact_hessian(model, x.double() if isinstance(model, nn.Linear) else x, torch.arange(5) % 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("function", [exact_fisher, exact_hessian])
def test_torchscript_has_the_same(function: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        scripted = torch.jit.script(model)
    assert relative_difference(function(scripted, x, y), function(model, x, y)) < 1e-12


def test_a_hessian_that_pytorch_gets_wrong_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(WrongGradientError, match="not symmetric"):
        exact_hessian(model, torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)
