"""
Write your own measure
======================

A measure is a function of one trial: it sees the network, a subset of the training data and all that is known of the
gradients there. Standard errors, pairing, tables and JSON come with it.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatminima as fm
from flatminima.errors import UndefinedMeasureError
from flatminima.measures import Measure, Trial

EPOCHS = 15
TRIALS = 5

digits = load_digits()
images = torch.tensor(digits.images[:400], dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target[:400])


def trained(weight_decay: float) -> nn.Module:
    """A small network on the digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


models = {"no decay": trained(0.0), "decay 1e-4": trained(1e-4)}

# %%
# A function of a trial
# ---------------------
# ``trial.losses`` are the losses of the subset's samples. The measure is known by the function's name.


def largest_loss(trial: Trial) -> float:
    """The loss of the sample that fits worst."""
    return float(trial.losses.max())


# %%
# What the gradients say
# ----------------------
# ``trial.correlation`` holds the cosines of the samples' gradients and ``trial.gram`` their Gram matrix ξ in factored
# form, whose scales are logarithms: they keep their digits however small the loss is. Where a measure makes no sense,
# it says so, and why.


def opposed_pairs(trial: Trial) -> float:
    """The fraction of pairs of samples whose gradients point away from each other."""
    if trial.num_rows < 2:
        raise UndefinedMeasureError("one sample has no pairs")
    above = torch.triu_indices(trial.num_rows, trial.num_rows, offset=1)
    return float((trial.correlation[above[0], above[1]] < 0).double().mean())


# %%
# One of which larger values are better, with a label of its own, is a ``Measure``. ``trial.generator()`` draws the same
# numbers for this trial every time, so that all networks are treated alike.


def noise_margin(trial: Trial) -> float:
    """How many of the subset's predictions survive a little noise on the inputs."""
    noise = torch.randn(trial.inputs.shape, generator=trial.generator())
    with torch.no_grad():
        before, after = trial.model(trial.inputs), trial.model(trial.inputs + 0.2 * noise)
    return float((before.argmax(1) == after.argmax(1)).double().mean())


survivors = Measure("noise_margin", noise_margin, "predictions that survive noise", larger_is_better=True)

# %%
# In one table with all others
# ----------------------------

comparison = fm.compare(
    models,
    (images, labels),
    measures=["coherence", largest_loss, opposed_pairs, survivors],
    trials=TRIALS,
    progress=False,
)
print(comparison)
print(comparison.difference("no decay", "decay 1e-4", "opposed_pairs"))
print(comparison.ranks("noise_margin"))
