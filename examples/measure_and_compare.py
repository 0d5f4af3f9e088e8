"""
Which of two checkpoints is better?
===================================

Two networks fit the same 600 handwritten digits equally well. One of them will do better on new digits. We measure both
on the training data alone, decide, and look at the test set only then.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flatminima as fm

TRIALS = 10
TARGET_LOSS = 0.02

digits = load_digits()
shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.images, dtype=torch.float32)[shuffled] / 16
labels = torch.tensor(digits.target)[shuffled]
train_set, test_set = (images[:600], labels[:600]), (images[-500:], labels[-500:])

# %%
# Two checkpoints
# ---------------
# Any two of yours would do. Here the second has been made worse on purpose: it also had to fit 200 other digits with
# random labels. Both are trained until the mean loss on the 600 digits is 0.02, so that neither fits them better.


def trained(extra_images: Tensor, extra_labels: Tensor) -> nn.Module:
    """A network trained on the 600 digits and what else is given, until it fits the 600."""
    torch.manual_seed(1)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(nn.Flatten(), *layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    inputs, targets = torch.cat([train_set[0], extra_images]), torch.cat([train_set[1], extra_labels])
    loss_fn = nn.CrossEntropyLoss()
    for _ in range(500):
        for batch in torch.randperm(len(inputs)).split(50):
            optimizer.zero_grad()
            loss_fn(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            if loss_fn(model(train_set[0]), train_set[1]) <= TARGET_LOSS:
                return model
    raise RuntimeError("the network does not fit its training set")


random_labels = torch.randint(10, (200,), generator=torch.Generator().manual_seed(2))
models = {"first": trained(images[:0], labels[:0]), "second": trained(images[600:800], random_labels)}

# %%
# Measure and compare
# -------------------
# ``compare`` measures both on the same random subsets of the training data, so that their differences are paired.
# Smaller is better.

comparison = fm.compare(models, train_set, trials=TRIALS, progress=False)
print(comparison)

# %%
# γ̂ is the sum of three parts. The *residual* says how well a minimum fits. It differs although the mean losses do not,
# as it is a mean of logarithms: one network fits most digits closely and a few badly. What is left, sensitivity +
# diversity, is the evidence about the minimum itself, and it comes with a standard error.

difference = comparison.difference("first", "second", "log_det_unit_fisher")
print(f"γ̂ at unit residuals, first - second: {difference}")
better = "first" if difference.mean < 0 else "second"
certainty = abs(difference.mean) / difference.standard_error
print(f"take the {better}: the difference is {certainty:.0f} times its standard error")

# %%
# The test set agrees
# -------------------

with torch.no_grad():
    for name, model in models.items():
        error = (model(test_set[0]).argmax(1) != test_set[1]).float().mean()
        print(f"{name}: test error {error:.1%}")

figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
for axis, part in zip(axes, ("residual", "sensitivity", "diversity"), strict=True):
    found = [comparison.characterizations[name].estimates()[part] for name in models]
    errors = [estimate.standard_error for estimate in found]
    axis.bar(list(models), [estimate.mean for estimate in found], yerr=errors, color=["C0", "C1"], capsize=4)
    axis.set_title(part)
figure.suptitle("γ̂ = residual + sensitivity + diversity")
plt.show()

# %%
# One pair of networks shows how it is done, and proves nothing about the measure: for that see
# :doc:`judge_measures` and the results on this site.
