"""Brute-force references: plain autograd, one sample at a time, in float64."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.network.batches import call_model, map_tensors, take


def explicit_jacobian(model: nn.Module, inputs, targets: Tensor, loss=None) -> Tensor:
    """J in float64: (N, W), the gradient of each sample's loss over the trainable parameters, model in eval mode."""
    model = copy.deepcopy(model).double().eval()
    inputs = map_tensors(lambda x: x.double() if x.is_floating_point() else x, inputs)
    loss = loss or (lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(targets)):
        one = slice(i, i + 1)
        value = loss(call_model(model, take(inputs, one)), targets[one]).sum()
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def explicit_gram(model: nn.Module, inputs, targets: Tensor, loss=None) -> Tensor:
    jacobian = explicit_jacobian(model, inputs, targets, loss)
    return jacobian @ jacobian.T
