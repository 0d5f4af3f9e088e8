"""
Measure and train low-rank adapters
===================================

Only trainable parameters count, in measures and in the regularizer. So a fine-tuned network with LoRA adapters (Hugging
Face's peft) is measured in the space in which it was trained.
"""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flatminima as fm

PRETRAINING = 6
EPOCHS = 20
TRIALS = 5

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
known = labels < 5

# %%
# A network that knows the digits 0 to 4
# --------------------------------------


def train(model: nn.Module, inputs: Tensor, targets: Tensor, epochs: int, lr: float, beta: float = 0.0) -> None:
    """SGD, with the regularizer where ``beta`` is positive."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    regularizer = fm.FisherTraceRegularizer(model, beta=beta, num_sub_batches=4, max_grad_norm=5.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(50):
            optimizer.zero_grad()
            if beta:
                regularizer.backward(nn.CrossEntropyLoss(), inputs[batch], targets[batch])
            else:
                nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()


torch.manual_seed(0)
base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
train(base, images[known], labels[known], PRETRAINING, lr=0.1)

# %%
# Adapters for the digits 5 to 9
# ------------------------------
# Adapters of rank 4 on the hidden layers, and a new last layer; everything else is frozen. One is trained plainly, the
# other with the regularizer, on 300 of the new digits.

new_images, new_labels = images[~known], labels[~known] - 5
train_set, test_set = (new_images[:300], new_labels[:300]), (new_images[300:], new_labels[300:])


def adapted(beta: float) -> nn.Module:
    """The base network with adapters, trained."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], modules_to_save=["4"])
    model = get_peft_model(copy.deepcopy(base), config)
    train(model, *train_set, EPOCHS, lr=0.05, beta=beta)
    return model


models = {"plain": adapted(0.0), "regularized": adapted(100.0)}
for name, model in models.items():
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        error = (model(test_set[0]).argmax(1) != test_set[1]).float().mean()
    print(f"{name}: {trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters, test error {error:.1%}")

# %%
# Measured by the adapters' gradients alone
# -----------------------------------------
# ``per_parameter`` says which of them carry the Fisher information.

comparison = fm.compare(models, train_set, subset_size=50, trials=TRIALS, per_parameter=True, progress=False)
print(comparison)
for name, share in (comparison.characterizations["plain"].shares or {}).items():
    print(f"{name:60} {share.fisher_trace.mean:.3g}")
