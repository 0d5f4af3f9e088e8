"""
Judge measures by a ledger
==========================

Does a measure say anything about the error that the training loss has not said already? That takes many minima whose
errors differ, in a table: a *ledger*. Here one is made on handwritten digits and judged; yours may come from anywhere.
"""

from __future__ import annotations

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn

import flatminima as fm
from flatminima.protocols import Ledger, evaluate

WRONG_LABELS = (0, 100, 200)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 15
TRIALS = 3

digits = load_digits()
shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.images, dtype=torch.float32)[shuffled].flatten(1)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)[shuffled]
train_set, test_images, test_labels = (images[:400], labels[:400]), images[-800:], labels[-800:]

# %%
# One row a minimum
# -----------------
# The hyper-parameter that is varied is the number of randomly labelled digits among those that a network has to fit. It
# is measured on the digits with their own labels.


def minimum(wrong: int, seed: int) -> dict[str, float]:
    """Train and measure one network."""
    torch.manual_seed(seed)
    inputs, targets = images[: 400 + wrong], labels[: 400 + wrong].clone()
    targets[400:] = torch.randint(10, (wrong,))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(EPOCHS * (1 + wrong // 100)):
        for batch in torch.randperm(len(inputs)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    found = fm.measure(model, train_set, subset_size=50, trials=TRIALS, robustness_samples=0, progress=False)
    with torch.no_grad():
        test_error = float((model(test_images).argmax(1) != test_labels).float().mean())
    measures = {name: estimate.mean for name, estimate in found.estimates().items()}
    return {"wrong": wrong, "seed": seed, "test_error": test_error, "train_loss": found.train_loss, **measures}


table = pd.DataFrame([minimum(wrong, seed) for wrong in WRONG_LABELS for seed in SEEDS])
print(table[["wrong", "seed", "test_error", "train_loss", "log_det_fisher", "log_det_unit_fisher"]])

# %%
# What the protocols say
# ----------------------
# Kendall's τ says how a measure orders the minima; the *partial* τ and ρ what is left once the training loss has had
# its say. On the command line: ``flatminima evaluate ledger.csv --hyper-parameters wrong --seed-column seed``.

ledger = Ledger.of(
    table, error="test_error", given="train_loss", hyper_parameters=["wrong"], seed="seed", test_size=len(test_labels)
)
evaluation = evaluate(ledger)
for line in evaluation.conclusions():
    print("*", line)

# %%
# Every number has an interval, or a reason why there is none.

evidence = evaluation.measures["log_det_unit_fisher"]
print(evidence.kendall)
print(evidence.partial_kendall)
