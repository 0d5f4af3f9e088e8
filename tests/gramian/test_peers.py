"""Our ξ against other libraries' wherever they are right, and a record of where they refuse or err.

Install them with the extra ``oracles``; without one, its tests are skipped. An error here after an upgrade usually
means that a peer has learnt something: then its line in the tables below goes.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.gramian.engine import factored_gram
from support.cases import CASES, Case
from support.peers import PEERS

PACKAGES = {
    "vmap_grad": "torch.func",
    "backpack": "backpack",
    "opacus": "opacus",
    "nngeometry": "nngeometry",
    "torchjd": "torchjd.autogram",
}

NO_RULE = "'Parameter' object has no attribute 'grad_batch'"
NO_LAYER = "I do not know what to do with layer"
IN_PLACE = "is being modified inplace"
HAS_STATE = "incompatible with the autogram engine"

REFUSES: dict[str, dict[str, str]] = {
    "vmap_grad": {"recurrent": "doesn't match the broadcast shape"},
    "backpack": {
        "groupnorm": NO_RULE,
        "instancenorm": NO_RULE,
        "instancenorm running": NO_RULE,
        "layernorm": NO_RULE,
        "rmsnorm": NO_RULE,
        "parametrized": NO_RULE,
        "functional": NO_RULE,
        "vision transformer": NO_RULE,
        "tied embedding": "expected scalar type Float but found Double",
        "torch's attention": NO_RULE,
        "reused block": "'Linear' object has no attribute 'output'",
        "in place": IN_PLACE,
        "positions": IN_PLACE,
    },
    "opacus": {
        "in place": IN_PLACE,
        "torch's attention": "missing 2 required positional arguments",
        "recurrent": "doesn't match the broadcast shape",
    },
    "nngeometry": {
        "linear on positions": "batch1 must be a 3D tensor",
        "conv2d padding same": "argument 'padding'",
        "conv1d": "must match the size of tensor",
        "conv1d narrowing": "must match the size of tensor",
        "conv3d": NO_LAYER,
        "conv3d dilated": NO_LAYER,
        "instancenorm": NO_LAYER,
        "instancenorm running": NO_LAYER,
        "rmsnorm": NO_LAYER,
        "tied embedding": NO_LAYER,
        "functional": NO_LAYER,
        "vision transformer": NO_LAYER,
        "torch's attention": NO_LAYER,
        "positions": NO_LAYER,
        "recurrent": NO_LAYER,
    },
    "torchjd": {
        "instancenorm running": "track_running_stats=True",
        "torch's attention": "Expected all tensors to have the same size in the mapped dimension",
        "recurrent": HAS_STATE,
    },
}
"""Peer → case → what it says, in part."""

PADDING_MODE = "takes the padding for zeros, whatever padding_mode says"
HOOKS_ONLY = "counts a tied weight's use in its own module alone"
WRONG: dict[str, dict[str, str]] = {
    "backpack": {
        "conv2d padding same": "hands 'same' to a convolution whose kernel is the output gradient",
        "conv2d reflect": PADDING_MODE,
        "conv2d circular": PADDING_MODE,
    },
    "opacus": {
        "conv2d reflect": PADDING_MODE,
        "conv2d circular": PADDING_MODE,
        "instancenorm running": "sees nothing in eval mode, and in training mode the statistics are the sample's",
        "tied embedding": HOOKS_ONLY,
    },
    "nngeometry": {
        "conv2d grouped": "forms rows of the ungrouped weight's size",
        "conv2d depthwise": "forms rows of the ungrouped weight's size",
        "conv2d reflect": PADDING_MODE,
        "conv2d circular": PADDING_MODE,
        "reused block": "keeps a reused layer's last input only",
        "frozen": "differentiates frozen parameters too",
        "parametrized": "differentiates the weight, not the parameters that it is made of",
    },
    "torchjd": {"tied embedding": HOOKS_ONLY},
}
"""Peer → case → why its number, given without a warning, is not JJᵀ."""

REFUSES_BATCHNORM = {"opacus": "This layer has buffers", "torchjd": HAS_STATE}
"""Peers that take no BatchNorm in eval mode either; every other case is put to them with BatchNorm left out."""

ON_ONE_TENSOR = [case for case in CASES if isinstance(case.inputs(), Tensor)]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the peers' warnings; ours stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peer_gram(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with _quietly():
        return PEERS[name](copy.deepcopy(model).eval(), cross_entropy)(x, y)


def assert_same_gram(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def without_batchnorm(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            setattr(model, name, nn.Identity())
        else:
            without_batchnorm(child)
    return model


def require(name: str) -> None:
    pytest.importorskip(PACKAGES[name], reason=f"{name} is not installed (extra 'oracles')")


@pytest.mark.parametrize("case", ON_ONE_TENSOR, ids=lambda case: case.name)
@pytest.mark.parametrize("name", PEERS)
def test_xi_against(name: str, case: Case, request: pytest.FixtureRequest) -> None:
    require(name)
    model, x, y = case.build()
    if name in REFUSES_BATCHNORM:
        model = without_batchnorm(model)
    if case.name in REFUSES[name]:
        with pytest.raises(Exception, match=REFUSES[name][case.name]):
            peer_gram(name, model, x, y)
        return
    if reason := WRONG.get(name, {}).get(case.name):
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"{name} {reason}"))
    assert_same_gram(peer_gram(name, model, x, y), factored_gram(model, x, y).matrix())


@pytest.mark.parametrize(("name", "message"), REFUSES_BATCHNORM.items())
def test_refuses_batchnorm_in_eval_mode(name: str, message: str) -> None:
    require(name)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    with pytest.raises((ValueError, NotImplementedError), match=message):
        peer_gram(name, model, torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3)


@pytest.fixture(scope="module")
def minimum() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network with BatchNorm trained to a minimum of separable data."""
    torch.manual_seed(0)
    y = torch.arange(24) % 3
    x = 2 * torch.randn(3, 2, 6, 6, dtype=torch.float64)[y] + 0.3 * torch.randn(24, 2, 6, 6, dtype=torch.float64)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def dense_empirical_fisher(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(1/N) JᵀJ, the matrix (W, W) that ours never form, by curvlinops."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed (extra 'oracles')")
    with _quietly():
        operator = curvlinops.EFLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
        return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def test_measures_against_the_dense_fisher(minimum: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = minimum
    n = len(y)
    fisher = dense_empirical_fisher(model, x, y)
    c = fm.measure(model, (x, y), subset_size=n, trials=1, measures=())
    eigenvalues = torch.linalg.eigvalsh(fisher).flip(0)
    largest = eigenvalues[0].item()
    spectrum = torch.tensor(c.spectrum, dtype=torch.float64)
    assert c.fisher_trace.mean == pytest.approx(fisher.trace().item(), rel=1e-10)
    assert c.fisher_frobenius_norm.mean == pytest.approx(fisher.square().sum().item(), rel=1e-10)
    assert c.spectral_radius.mean == pytest.approx(n * largest, rel=1e-10)
    torch.testing.assert_close(spectrum / n, eigenvalues[:n], rtol=1e-8, atol=1e-13 * largest)
    assert eigenvalues[n:].abs().max() < 1e-13 * largest


def test_log_determinant_against_the_dense_fisher(minimum: tuple[nn.Module, Tensor, Tensor]) -> None:
    """γ̂ is the sum of ln of N' times the nonzero eigenvalues; few samples keep them clear of rounding."""
    model, x, y = minimum[0], minimum[1][:6], minimum[2][:6]
    eigenvalues = torch.linalg.eigvalsh(dense_empirical_fisher(model, x, y))[-6:]
    c = fm.measure(model, (x, y), subset_size=6, trials=1, measures=())
    assert c.log_det_fisher.mean == pytest.approx((6 * eigenvalues).log().sum().item(), rel=1e-8)
