"""
Train with Lightning
====================

The regularizer is a callback of Lightning's Trainer. Mixed precision, accumulation, clipping, processes and checkpoints
stay Lightning's, and the module does not change.

::

    python examples/train_with_lightning.py
    python examples/train_with_lightning.py 2    # on two processes
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from flatminima.integrations.lightning import FisherTraceCallback

# %%
# A module as any other
# ---------------------


class Classifier(LightningModule):
    """A small network with BatchNorm, a metric and a log."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10))
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        inputs, labels = batch
        logits = self.network(inputs)
        self.accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


# %%
# The Trainer with the callback
# -----------------------------


def main(devices: int = 1, callback: FisherTraceCallback | None = None, **arguments: object) -> Trainer:
    """Train on 512 digits; returns the trainer, whose ``callback_metrics`` hold the diagnostics."""
    seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data[:512] / 16).float(), torch.tensor(digits.target[:512]))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[callback or FisherTraceCallback(beta=10.0, num_sub_batches=4)],  # this, and nothing else
        gradient_clip_val=5.0,
        **{
            "max_epochs": 4,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **arguments,
        },
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True, drop_last=True))
    return trainer


if __name__ == "__main__":
    metrics = main(*map(int, sys.argv[1:])).callback_metrics
    print({name: float(value) for name, value in metrics.items()})
