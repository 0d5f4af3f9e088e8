"""
Train under label noise
=======================

A network that is large enough fits wrong labels too, and pays for it on new data. The Fisher-trace regularizer makes
that harder: one line of the training loop changes.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flatminima import FisherTraceRegularizer

EPOCHS = 32
SEEDS = (0, 1, 2)

digits = load_digits()
shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.images, dtype=torch.float32)[shuffled].flatten(1)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)[shuffled]
test_images, test_labels = images[-500:], labels[-500:]

# %%
# Data with wrong labels
# ----------------------
# 600 digits have their own labels, 200 others random ones. Nothing tells the network which are which.

train_images, train_labels = images[:800], labels[:800].clone()
train_labels[600:] = torch.randint(10, (200,), generator=torch.Generator().manual_seed(1))

# %%
# The training loop
# -----------------
# The regularized run replaces ``loss.backward()`` and nothing else. β is large because these networks and their
# gradients are small; choose yours on held-out training data (the how-to on training says how).


def test_error_of(*, beta: float, epochs: int, seed: int) -> float:
    """Train one network; its error on the test set."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * len(train_images) // 100
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
    loss_fn = nn.CrossEntropyLoss()
    regularizer = FisherTraceRegularizer(model, alpha=1e-4, beta=beta, num_sub_batches=5, max_grad_norm=5.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images)).split(100):
            optimizer.zero_grad()
            if beta:
                regularizer.backward(loss_fn, train_images[batch], train_labels[batch])
            else:
                loss_fn(model(train_images[batch]), train_labels[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((model(test_images).argmax(1) != test_labels).float().mean())


# %%
# A regularized step costs about three plain ones, so a fair comparison has plain training of the same cost beside it.

arms: dict[str, dict[str, float | int]] = {
    "plain": {"beta": 0.0, "epochs": EPOCHS},
    "plain, equal cost": {"beta": 0.0, "epochs": 3 * EPOCHS},
    "regularized": {"beta": 2000.0, "epochs": EPOCHS},
}
errors = {arm: Tensor([test_error_of(**options, seed=seed) for seed in SEEDS]) for arm, options in arms.items()}
for arm, found in errors.items():
    print(f"{arm:18} test error {found.mean():.1%} ± {found.std():.1%}")

# %%
# Every point is a network, every colour a way to train.

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
for place, found in enumerate(errors.values()):
    axis.scatter(100 * found, [place] * len(found), color=f"C{place}")
axis.set_yticks(range(len(arms)), list(arms))
axis.set_xlim(0)
axis.invert_yaxis()
axis.set_xlabel("test error (%), a quarter of the labels made random")
plt.show()
