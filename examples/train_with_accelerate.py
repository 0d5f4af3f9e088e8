"""
Train with Accelerate
=====================

The regularizer in a loop written with Hugging Face Accelerate: one call takes the place of the forward pass and
``accelerator.backward``. Mixed precision, gradient scaling and accumulation stay Accelerate's.

::

    python examples/train_with_accelerate.py
    torchrun --nproc-per-node 2 examples/train_with_accelerate.py
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatminima import FisherTraceRegularizer
from flatminima.integrations.accelerate import backward


def main(mixed_precision: str = "no") -> dict[str, float]:
    """Train a small network on 512 digits; returns its diagnostics and losses."""
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data[:512] / 16).float(), torch.tensor(digits.target[:512]))
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10))
    loss_fn = nn.CrossEntropyLoss()

    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        DataLoader(data, batch_size=32, shuffle=True, drop_last=True),
    )
    regularizer = FisherTraceRegularizer(model, beta=10.0, num_sub_batches=4, max_grad_norm=5.0)
    accelerator.register_for_checkpointing(regularizer)

    losses = []
    for _ in range(3):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = backward(
                    accelerator, regularizer, loss_fn, x, y
                )  # was: accelerator.backward(loss_fn(model(x), y))
                optimizer.step()
                optimizer.zero_grad()  # here: before the last micro-batch it would clear the gradients of the others
            losses.append(float(loss))
    accelerator.end_training()
    return {"first_loss": losses[0], "last_loss": losses[-1], "steps": regularizer.step, **regularizer.diagnostics()}


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
