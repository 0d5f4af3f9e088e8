"""
Train in a loop like timm's
===========================

The regularizer in a loop like that of timm's ``train.py``: accumulation, autocast, a scaler, clipping, EMA.

::

    python examples/train_like_timm.py
    python examples/train_like_timm.py bfloat16
    python examples/train_like_timm.py float16

In ``train.py`` itself ``regularizer.backward`` takes the place of ``_forward`` and ``_backward``, without ``no_sync``:
gradients are exchanged between processes when ``last`` says so. The scaler is ``loss_scaler._scaler`` there; where
``loss_scaler`` is None, leave it out and call ``optimizer.step()``. ``--clip-grad`` goes to ``max_grad_norm``; for the
clipping modes ``value`` and ``agc``, leave that None and clip as before, after ``scaler.unscale_(optimizer)``.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from flatminima import FisherTraceRegularizer

# %%
# One epoch
# ---------
# Two calls have changed, and the lines that they replace are beside them.


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: FisherTraceRegularizer,
    scaler: torch.amp.GradScaler,
    model_ema: AveragedModel,
    *,
    amp_dtype: torch.dtype,
    grad_accum_steps: int,
) -> list[float]:
    """One pass over the data, whose last update may have fewer micro-batches; returns the micro-batches' losses."""
    model.train()
    losses = []
    last_accum_steps = len(loader) % grad_accum_steps or grad_accum_steps
    for batch_idx, (inputs, target) in enumerate(loader):
        need_update = batch_idx == len(loader) - 1 or (batch_idx + 1) % grad_accum_steps == 0
        accum_steps = last_accum_steps if batch_idx >= len(loader) - last_accum_steps else grad_accum_steps

        with torch.autocast("cpu", amp_dtype, enabled=amp_dtype != torch.float32):
            # was: loss = loss_fn(model(inputs), target) / accum_steps
            loss = regularizer.backward(
                loss_fn, inputs, target, weight=1 / accum_steps, last=need_update, scaler=scaler
            )
        # was: loss_scaler(loss, optimizer, clip_grad=..., parameters=..., need_update=need_update)
        if need_update:
            scaler.step(optimizer)
            scaler.update()

        losses.append(float(loss))
        if not need_update:
            continue
        optimizer.zero_grad()
        model_ema.update_parameters(model)
    return losses


# %%
# Everything around it
# --------------------


def main(amp_dtype: str = "float32") -> dict[str, float]:
    """Train a small network on 512 digits; returns its diagnostics and losses."""
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data[:512] / 16).float(), torch.tensor(digits.target[:512]))
    loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regularizer = FisherTraceRegularizer(model, beta=10.0, num_sub_batches=4, max_grad_norm=5.0)
    scaler = torch.amp.GradScaler("cpu", enabled=amp_dtype == "float16")
    model_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    losses = [
        loss
        for _ in range(4)
        for loss in train_one_epoch(
            model,
            loader,
            nn.CrossEntropyLoss(),
            optimizer,
            regularizer,
            scaler,
            model_ema,
            amp_dtype=getattr(torch, amp_dtype),
            grad_accum_steps=3,
        )
    ]
    return {"first_loss": losses[0], "last_loss": losses[-1], "steps": regularizer.step, **regularizer.diagnostics()}


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
