"""
The loss around a minimum
=========================

Two pictures that people ask for: the loss on a plane through a minimum, and on the line between two minima. They show
something of a loss surface, and measure nothing: two directions of many thousand hide most of it.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import flatminima as fm

EPOCHS = 30
STEPS = 13

digits = load_digits()
shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.images, dtype=torch.float32)[shuffled].flatten(1) / 16
labels = torch.tensor(digits.target)[shuffled]
train_set = images[:600], labels[:600]


def trained(batch_size: int) -> nn.Module:
    """A network at the end of its training."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    loss_fn = nn.CrossEntropyLoss()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train_set[0])).split(batch_size):
            optimizer.zero_grad()
            loss_fn(model(train_set[0][batch]), train_set[1][batch]).backward()
            optimizer.step()
    return model


small, large = trained(batch_size=20), trained(batch_size=200)

# %%
# A plane around one of them
# --------------------------
# Two random directions, in which each filter has the norm of the network's own (Li et al. 2018), so that networks whose
# layers have different scales can be compared.

around = fm.landscape(small, train_set, dimensions=2, steps=STEPS, progress=False)
around.plot()
plt.show()

# %%
# The line between two
# --------------------
# 0 is the network trained in small batches, 1 the other. Both began at the same weights.

between = fm.landscape(small, train_set, directions="between", to=large, steps=21, progress=False)
between.plot()
plt.show()

# %%
# Where the loss curves most
# --------------------------
# ``directions="hessian"`` goes along the eigenvectors of the largest eigenvalues: here distances are those of weight
# space, and the eigenvalues say how fast the loss rises.

steepest = fm.landscape(small, train_set, directions="hessian", extent=0.5, steps=STEPS, progress=False)
print("largest eigenvalue of the Hessian:", ", ".join(f"{value:.3g}" for value in steepest.eigenvalues))
steepest.plot()
plt.show()
