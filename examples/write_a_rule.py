"""
Write a rule for your own layer
===============================

γ̂ needs every sample's gradient. For PyTorch's layers they follow from one backward pass; a layer that the library does
not know is measured exactly too, but one sample at a time. A rule of a few lines makes it as fast as the others.
"""

from __future__ import annotations

import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import flatminima as fm
from flatminima.gramian.rules import ParameterUse, positions, rule

EPOCHS = 20

digits = load_digits()
images = torch.tensor(digits.images[:300], dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target[:300])

# %%
# A layer of one's own
# --------------------
# An activation with a trainable bend per channel. ``wrap_torch_function`` makes calls of the function visible; without
# it only the operations inside are.


@wrap_torch_function(lambda x, bend: (x, bend))
def bent(x: Tensor, bend: Tensor) -> Tensor:
    """Gives x + bend · x²: element by element, over channels that are last."""
    return x + bend * x * x


class Bent(nn.Module):
    """The function above with its parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return bent(x, self.bend)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), Bent(64), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(EPOCHS):
    for batch in torch.randperm(len(images)).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()

# %%
# Without a rule
# --------------
# The numbers are right, and a warning names the parameter that was formed one sample at a time.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    before = fm.measure(model, (images, labels), subset_size=50, trials=3, progress=False)
print(*(warning.message for warning in caught), sep="\n")

# %%
# The rule
# --------
# It gets the number of samples and the function's own arguments, and returns how the gradient at the output becomes a
# row of J for every sample: here the gradient times x², summed over all dimensions but the sample's and the channel's.


@rule(bent)
def rule_of_bent(n: int, x: Tensor, bend: Tensor) -> list[ParameterUse]:
    """Rows of J for ``bend[start:stop]``, of shape (n, stop - start)."""

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return positions(grad * x * x, n).sum(1)[:, start:stop]

    return [ParameterUse(bend, rows, reads=x)]


# %%
# The same numbers, without the warning
# -------------------------------------
# Nothing has to be taken on trust: every measurement holds the rows of all rules against plain autograd, and a wrong
# rule gives a warning and the slow way instead of a wrong number.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    after = fm.measure(model, (images, labels), subset_size=50, trials=3, progress=False)
print("warnings:", len(caught))
print("γ̂ without the rule:", before.log_det_fisher)
print("γ̂ with the rule:   ", after.log_det_fisher)
