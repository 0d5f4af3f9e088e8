"""
Follow a training run
=====================

How do γ̂'s parts go while a network trains? A tracker measures the same few subsets of the training set every other
epoch and hands its numbers to whatever logger there is.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import flatminima as fm

EPOCHS = 24

digits = load_digits()
shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.images, dtype=torch.float32)[shuffled].flatten(1) / 16
labels = torch.tensor(digits.target)[shuffled]
train_set, held_out = (images[:600], labels[:600]), (images[-500:], labels[-500:])

# %%
# One call an epoch
# -----------------
# The tracker needs the *un-augmented* training set. It leaves the model, its mode and all random generators as they
# were, so that training goes on as if nothing had been measured. ``time_share=0.05`` would keep it to a twentieth of
# the time, ``path="epochs.jsonl"`` would keep every epoch in a file.

tracker = fm.Tracker(train_set, fm.MeasureOptions(subset_size=20, trials=5, progress=False), every=2)

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
loss_fn = nn.CrossEntropyLoss()


def error_on(inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The share of wrong answers."""
    with torch.no_grad():
        return float((model(inputs).argmax(1) != targets).float().mean())


for epoch in range(1, EPOCHS + 1):
    for batch in torch.randperm(len(train_set[0])).split(50):
        optimizer.zero_grad()
        loss_fn(model(train_set[0][batch]), train_set[1][batch]).backward()
        optimizer.step()
    metrics = tracker(model, epoch, validation_error=error_on(*held_out))
    if metrics is not None:  # a flat dictionary: logger.log_metrics(metrics)
        print(f"epoch {epoch:2}: loss {metrics['train_loss']:.4f}, diversity {metrics['diversity']:.1f}")

# %%
# The picture
# -----------
# The *residual* falls, because the fit gets better. What tells trainings apart are sensitivity and diversity.

tracker.plot()
plt.show()

# %%
# In Lightning and Transformers the tracker is a callback, and ``flatminima track`` measures checkpoints that lie there
# already: see the how-to on following a run.
