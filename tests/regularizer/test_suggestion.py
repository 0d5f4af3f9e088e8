"""Settings to start from: what they follow from, and that nothing is left changed."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatminima import FisherTraceRegularizer, suggest
from flatminima.errors import FlatminimaError, NotTrainingWarning
from support.once_differentiable import Once
from support.regularizer_cases import CASES, SEED, Case, assert_same_bits, by_case, make, mlp, snapshot

Batch = tuple[Tensor, Tensor]


def batches(count: int = 1, size: int = 32, dtype: torch.dtype = torch.float64) -> list[Batch]:
    torch.manual_seed(SEED)
    return [(torch.randn(size, 6, dtype=dtype), torch.randint(3, (size,))) for _ in range(count)]


def by_plain_autograd(model: nn.Module, batch: Batch, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """mean_i ‖g_i‖², ‖mean_i g_i‖ and ‖∇R_α‖ for four sub-batches; the split is the one drawn next."""
    parameters = list(model.parameters())
    order = torch.randperm(len(batch[1]))
    traces, means, differences = [], [], []
    for rows in order.tensor_split(4):

        def gradient(network: nn.Module, rows: Tensor = rows) -> Tensor:
            loss = F.cross_entropy(network(batch[0][rows]), batch[1][rows])
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

        here, moved = gradient(model), copy.deepcopy(model)
        steps = torch.split(here, [p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, step in zip(moved.parameters(), steps, strict=True):
                parameter -= alpha * step.view_as(parameter)
        traces.append(here.square().sum())
        means.append(here)
        differences.append(here - gradient(moved))
    mean = torch.stack(means).mean(0)
    return torch.stack(traces).mean(), mean.norm(), torch.stack(differences).mean(0).norm()


def test_it_says_what_plain_autograd_says_of_the_batch() -> None:
    model, (batch,) = mlp().double(), batches()
    torch.manual_seed(SEED)
    trace, gradient, penalty = by_plain_autograd(model, batch, 1e-4)
    torch.manual_seed(SEED)
    found = suggest(model, F.cross_entropy, batch, penalty_to_gradient=2.0)
    assert found.num_sub_batches == 4
    assert found.fisher_trace == pytest.approx(float(trace))
    assert found.gradient_norm == pytest.approx(float(gradient))
    assert found.beta == float(f"{float(2 * gradient / penalty):.1e}")
    assert found.penalty_to_gradient == pytest.approx(found.beta * float(penalty / gradient), rel=1e-6)


def test_the_regularizer_finds_what_was_aimed_at() -> None:
    model, seen = mlp().double(), batches(5)
    torch.manual_seed(SEED)
    found = suggest(model, F.cross_entropy, seen)
    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, **found.settings)
    ratios, clipped = [], 0.0
    for inputs, targets in seen:
        model.zero_grad()
        state = torch.get_rng_state()
        regularizer.penalize(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (inputs, targets))
        ratios.append(regularizer.diagnostics()["penalty_to_gradient"])
        torch.set_rng_state(state)  # the same sub-batches once more
        regularizer.backward(F.cross_entropy, inputs, targets)
        clipped = regularizer.diagnostics()["clip_rate"]
    assert sorted(ratios)[2] == pytest.approx(found.penalty_to_gradient, rel=1e-6)
    assert clipped == found.clip_rate


def test_a_stronger_penalty_is_one_of_more_weight() -> None:
    model, (batch,) = mlp().double(), batches()
    weak, strong = (suggest(model, F.cross_entropy, batch, penalty_to_gradient=r).beta for r in (0.1, 10.0))
    assert strong == pytest.approx(100 * weak, rel=0.1)


def test_beta_grows_as_gradients_shrink() -> None:
    """A loss of a tenth has a tenth of the gradient and a hundredth of the penalty."""
    model, (batch,) = mlp().double(), batches()
    whole = suggest(model, F.cross_entropy, batch)
    tenth = suggest(model, lambda outputs, targets: F.cross_entropy(outputs, targets) / 10, batch)
    assert tenth.beta == pytest.approx(10 * whole.beta, rel=0.1)


@by_case
@pytest.mark.filterwarnings("ignore::flatminima.errors.NotTrainingWarning")  # a case's mode is its own
def test_nothing_is_left_changed(case: Case) -> None:
    model, inputs, targets = make(case)
    gradient = torch.ones_like(next(model.parameters()))
    next(model.parameters()).grad = gradient
    before, modes = snapshot(model), [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    suggest(model, case.loss_fn, (inputs, targets))
    assert_same_bits(snapshot(model), before)
    assert [module.training for module in model.modules()] == modes
    assert next(model.parameters()).grad is gradient
    assert [p.grad for p in model.parameters()][1:] == [None] * (len(list(model.parameters())) - 1)
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize(
    ("size", "expected"), [(128, 16), (100, 10), (64, 8), (50, 5), (32, 4), (101, 12), (8, 4), (4, 4), (2, 2), (1, 1)]
)
def test_sub_batches_divide_the_batch_and_have_eight_samples_if_they_can(size: int, expected: int) -> None:
    assert suggest(mlp().double(), F.cross_entropy, batches(size=size)).num_sub_batches == expected


def test_batchnorm_gets_two_samples_at_least() -> None:
    model, inputs, targets = make(CASES["batchnorm"], samples=6)
    assert suggest(model, CASES["batchnorm"].loss_fn, (inputs, targets)).num_sub_batches == 3


def test_a_last_batch_too_short_for_batchnorm_is_left_out() -> None:
    model, inputs, targets = make(CASES["batchnorm"], samples=17)
    loss_fn, whole = CASES["batchnorm"].loss_fn, (inputs[:16], targets[:16])
    torch.manual_seed(SEED)
    alone = suggest(model, loss_fn, whole)
    torch.manual_seed(SEED)
    assert suggest(model, loss_fn, [whole, (inputs[16:], targets[16:])]) == alone
    with pytest.raises(FlatminimaError, match="no statistics on a batch of 1 sample: pass larger batches"):
        suggest(model, loss_fn, (inputs[16:], targets[16:]))


def test_a_short_batch_without_batchnorm_counts() -> None:
    (batch,) = batches()
    assert suggest(mlp().double(), F.cross_entropy, [batch, (batch[0][:1], batch[1][:1])]).batches == 2


def test_eval_mode_is_warned_of() -> None:
    model, inputs, targets = make(CASES["batchnorm"])
    model.eval()
    with pytest.warns(NotTrainingWarning, match="call model.train\\(\\) before suggest"):
        suggest(model, CASES["batchnorm"].loss_fn, (inputs, targets))
    assert not model.training


def test_alpha_is_the_papers_where_the_loss_is_straight_and_sharply_computed() -> None:
    found = suggest(mlp().double(), F.cross_entropy, batches())
    assert (found.alpha, found.estimator) == (1e-4, "finite-difference")
    assert found.penalty_to_trace == pytest.approx(1, abs=0.01)


def scaled(factor: float) -> Any:
    """A loss whose penalty has ``factor`` times the usual curvature, next to the gradient.

    Of float64 logits, as a small cross entropy of others rounds by itself.
    """
    return lambda outputs, targets: factor * F.cross_entropy(outputs.double(), targets)


def test_alpha_is_larger_where_the_difference_rounds() -> None:
    found = suggest(mlp(), scaled(3e-3), batches(dtype=torch.float32)[0])  # far from both borders, on any processor
    assert (found.alpha, found.estimator) == (1e-2, "finite-difference")
    assert 0 < found.rounding_share <= 0.1


def test_the_exact_form_is_for_what_always_rounds() -> None:
    found = suggest(mlp(), scaled(1e-7), batches(dtype=torch.float32)[0])
    assert (found.alpha, found.estimator, found.rounding_share) == (1e-4, "hvp", 0.0)
    assert "estimator" in str(found)


def test_where_neither_form_works_it_says_so() -> None:
    loss_fn = scaled(1e-7)
    with pytest.raises(
        FlatminimaError, match=r"mostly rounding at every alpha up to 0.01.*second derivatives.*float32"
    ):
        suggest(mlp(), lambda outputs, y: loss_fn(Once.apply(outputs), y), batches(dtype=torch.float32)[0])


def test_alpha_is_at_least_its_smallest_and_a_round_number() -> None:
    found = suggest(mlp().double(), lambda outputs, _: (1e3 * outputs).sin().mean(), batches())
    assert found.alpha == 1e-6


def test_alpha_is_smaller_where_the_loss_curves() -> None:
    found = suggest(mlp().double(), scaled(1e4), batches())
    assert found.alpha < 1e-4
    assert found.penalty_to_trace == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("factor", "expected"), [(1e-3, 1.0), (1e3, 5.0)])
def test_tau_is_a_usual_one_where_gradients_are_not(factor: float, expected: float) -> None:
    assert suggest(mlp().double(), scaled(factor), batches()).max_grad_norm == expected


def test_tau_is_the_largest_plain_gradient_rounded_up() -> None:
    model, (batch,) = mlp().double(), batches()
    norm = suggest(model, F.cross_entropy, batch).gradient_norm
    assert suggest(model, scaled(2.5 / norm), batch).max_grad_norm == 3.0


@pytest.mark.parametrize("way", ["tuple", "list", "loader", "loader's batch", "generator"])
def test_batches_may_come_in_every_way(way: str) -> None:
    (batch,) = batches()
    loader = DataLoader(TensorDataset(*batch), batch_size=32)
    given: dict[str, Any] = {
        "tuple": batch,
        "list": [batch],
        "loader": loader,
        "loader's batch": next(iter(loader)),
        "generator": (b for b in [batch]),
    }
    model = mlp().double()
    torch.manual_seed(SEED)
    expected = suggest(model, F.cross_entropy, batch)
    torch.manual_seed(SEED)
    assert suggest(model, F.cross_entropy, given[way]).beta == pytest.approx(expected.beta, rel=0.5)


def test_no_more_batches_are_read_than_are_looked_at() -> None:
    source = iter(batches(5))
    assert suggest(mlp().double(), F.cross_entropy, source, max_batches=2).batches == 2
    assert len(list(source)) == 3


def test_models_that_know_their_loss_take_their_labels_with_the_inputs() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp().double()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.model(x), labels)}

    (batch,) = batches()
    model = WithLoss()
    expected = suggest(model.model, F.cross_entropy, batch)
    inputs = {"x": batch[0], "labels": batch[1]}
    assert suggest(model, lambda outputs, _: outputs["loss"], (inputs, batch[1])) == expected


def test_it_shows_itself() -> None:
    found = suggest(mlp().double(), F.cross_entropy, batches(2))
    assert repr(found) == (
        f"Suggestion(alpha=0.0001, beta={found.beta}, num_sub_batches=4, max_grad_norm={found.max_grad_norm}, "
        "estimator='finite-difference')"
    )
    assert f"β, beta            │ {found.beta:g}"[:18] in str(found)
    assert "From 2 batches of 32" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    assert found._repr_html_().startswith("<table>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "there are no batches"),
        ({"batches": (torch.zeros(0, 6), torch.zeros(0))}, "the batches are empty"),
        ({"batches": torch.zeros(3)}, "batches must be .inputs, targets., or a loader or list of such, got Tensor"),
        ({"batches": {"x": torch.zeros(3)}}, "got dict"),
        ({"batches": (torch.zeros(3, 6),)}, "a batch must be .inputs, targets., got tuple of 1"),
        ({"batches": [torch.zeros(3, 6), torch.zeros(3), torch.zeros(3)]}, "got list of 3"),
        ({"batches": iter([3])}, "a batch must be .inputs, targets., got int"),
        ({"batches": (torch.zeros(3, 6), torch.zeros(2))}, "share their first dimension"),
        ({"loss_fn": None}, "loss_fn must be a function of the model's output and targets, got None"),
        ({"penalty_to_gradient": 0}, "penalty_to_gradient must be a positive number, got 0"),
        ({"max_batches": 0}, "max_batches must be at least 1, got 0"),
        ({"max_batches": 1.5}, "max_batches must be an integer, got 1.5"),
        ({"model": "weights.pt"}, "a model is a torch.nn.Module, got str"),
        ({"loss_fn": lambda outputs, _: 0 * outputs.sum()}, "the loss has no gradient at these weights"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments: dict[str, Any], message: str) -> None:
    given = {"model": mlp().double(), "loss_fn": F.cross_entropy, "batches": batches(), **arguments}
    with pytest.raises(FlatminimaError, match=message) as caught:
        suggest(given.pop("model"), given.pop("loss_fn"), given.pop("batches"), **given)
    assert "\n" not in str(caught.value)


def test_a_loss_without_curvature_has_no_right_beta() -> None:
    model = nn.Linear(6, 1).double()
    with pytest.raises(FlatminimaError, match="the penalty has no gradient at these weights"):
        suggest(model, lambda outputs, _: outputs.mean(), batches())
