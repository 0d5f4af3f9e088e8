from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatminima.errors import UndefinedMeasureError
from support.minima import network, value_of
from support.oracles import explicit_jacobian

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


def test_it_is_the_mean_cosine_of_descent_directions_and_weights() -> None:
    model, x, y = network()
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = F.cosine_similarity(-explicit_jacobian(model, x, y), w[None]).mean().item()
    assert value_of("weight_alignment", model, (x, y)) == pytest.approx(expected, rel=1e-9)


def test_of_a_last_layer_alone_it_is_the_authors_closed_form() -> None:
    """Their release: −⟨a, Wᵀ(p − y)⟩ / (‖a‖ ‖p − y‖ ‖W‖) for a linear layer without bias."""
    model, x, y = network()
    model[0].requires_grad_(False)
    a, W = model[:2](x), model[2].weight.detach()
    difference = model(x).detach().softmax(1) - F.one_hot(y, 4)
    scores = -(a * (difference @ W)).sum(1) / (a.norm(dim=1) * difference.norm(dim=1) * W.norm())
    assert value_of("weight_alignment", model, (x, y)) == pytest.approx(scores.mean().item(), rel=1e-9)


def test_weights_that_point_along_the_labels_are_aligned() -> None:
    model = nn.Linear(4, 4, bias=False).double()
    model.weight.data.copy_(2 * torch.eye(4))
    data = torch.eye(4, dtype=torch.float64), torch.arange(4)
    assert value_of("weight_alignment", model, data) > 0.4
    model.weight.data.neg_()
    assert value_of("weight_alignment", model, data) < -0.4


def test_gradients_weighted_by_the_weights_are_refused() -> None:
    model, x, y = network()
    with pytest.raises(UndefinedMeasureError, match="leave scale_invariant out"):
        value_of("weight_alignment", model, (x, y), scale_invariant=True)
