"""How good a start is ``flatminima.suggest``? Test errors of networks trained with it, without, and over a grid of β.

    python benchmarks/suggest.py --threads 1
    python benchmarks/suggest.py --seeds 10 11 --cases mlp --threads 1

Networks of the lab and of Transformers, on scikit-learn's digits with and without wrong labels; at the end of training,
without choosing the epoch. The suggestion is made once, on the fresh network. The rule's constants, how strong the
penalty is to be beside the gradient and the range of τ, were chosen on seeds 0 and 1000 to 1002 (in part longer
trainings), which take no part here. Finished runs are kept in the record, and not repeated by a second call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import harness
from flatminima import FisherTraceRegularizer, suggest
from flatminima.lab.data import load_data
from flatminima.lab.networks import build_model

PLAIN, SUGGESTED = "plain", "suggested"
BETAS = (30.0, 300.0, 3000.0)
ALPHA = 1e-4
BATCH = 32


class Logits(nn.Module):
    """A network of Transformers whose output is its logits."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network = network
        self.resize = nn.Upsample(size)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) → (N, 10)."""
        logits: Tensor = self.network(self.resize(images)).logits
        return logits


def vit() -> nn.Module:
    """A small vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return Logits(ViTForImageClassification(ViTConfig(**sizes, num_channels=1, intermediate_size=64, num_labels=10)), 8)


def resnet() -> nn.Module:
    """A small ResNet, with BatchNorm."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return Logits(ResNetForImageClassification(ResNetConfig(**sizes, num_channels=1, num_labels=10)), 16)


@dataclass(frozen=True)
class Case:
    """A network and its training; of ``images`` digits ``wrong`` have random labels."""

    network: Callable[[], nn.Module]
    epochs: int
    wrong: int
    images: int = 384
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    options: tuple[tuple[str, float], ...] = (("lr", 0.05), ("momentum", 0.9), ("weight_decay", 5e-4))

    def data(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images and labels, test images and labels."""
        parts = [part.tensors() for part in load_data("digits")]
        images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        images, labels = (images[order] - images.mean()) / images.std(), labels[order]
        train_labels = labels[: self.images].clone()
        train_labels[: self.wrong] = torch.randint(10, (self.wrong,), generator=generator)
        return images[: self.images], train_labels, images[self.images :], labels[self.images :]


ADAM: dict[str, Any] = {"optimizer": torch.optim.AdamW, "options": (("lr", 1e-2), ("weight_decay", 0.01))}
CASES = {
    "mlp, wrong labels": Case(lambda: build_model("mlp", in_channels=1), epochs=12, wrong=96),
    "small-cnn, wrong labels": Case(lambda: build_model("small-cnn", in_channels=1), epochs=8, wrong=96),
    "Transformers' ResNet, wrong labels": Case(resnet, epochs=8, wrong=96),
    "mlp": Case(lambda: build_model("mlp", in_channels=1), epochs=12, wrong=0),
    "Transformers' ViT": Case(vit, epochs=12, wrong=0, **ADAM),
}


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch."""
    for rows in torch.randperm(len(labels)).split(BATCH):
        yield images[rows], labels[rows]


def trained(case: Case, seed: int, arm: str) -> dict[str, Any]:
    """One network, plain, with the suggested settings, or with them but for α and β."""
    started = time.process_time()
    images, labels, test_images, test_labels = case.data(seed)
    torch.manual_seed(seed)
    model, loss_fn = case.network(), nn.CrossEntropyLoss()
    optimizer = case.optimizer(model.parameters(), **dict(case.options))
    steps = case.epochs * len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
    settings = suggest(model, loss_fn, batches(images, labels)).settings
    if arm not in (PLAIN, SUGGESTED):
        settings |= {"alpha": ALPHA, "beta": float(arm), "estimator": "finite-difference"}
    regularizer = FisherTraceRegularizer(model, **settings)
    for _ in range(case.epochs):
        for batch in batches(images, labels):
            optimizer.zero_grad()
            if arm == PLAIN:
                loss_fn(model(batch[0]), batch[1]).backward()
            else:
                regularizer.backward(loss_fn, *batch)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        error = float((model(test_images).argmax(1) != test_labels).float().mean())
        loss = float(loss_fn(model(images), labels))
    run = {"test_error": error, "train_loss": loss, "seconds": round(time.process_time() - started, 2)}
    return run if arm == PLAIN else run | {"settings": settings, "diagnostics": regularizer.diagnostics()}


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    options = harness.parse(parser)
    torch.set_num_threads(options.threads)
    name = options.output or "suggest"
    path = harness.RESULTS / f"{name}.json"
    runs: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    with harness.warnings_ignored():
        for case in options.cases:
            for seed in options.seeds:
                for arm in (PLAIN, SUGGESTED, *(f"{beta:g}" for beta in BETAS)):
                    own = runs.setdefault(case, {}).setdefault(arm, {})
                    if str(seed) in own:
                        continue
                    own[str(seed)] = trained(CASES[case], seed, arm)
                    print(f"{case}, seed {seed}, {arm}: {own[str(seed)]}", flush=True)
                    harness.write_json(name, {"environment": harness.environment(options), "runs": runs})


if __name__ == "__main__":
    main()
