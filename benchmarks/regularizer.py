"""What a step with the regularizer costs, as a ratio to a plain step of the same batch, beside SAM and double backward.

    python benchmarks/regularizer.py                                                 # hours on two cores
    python benchmarks/regularizer.py --networks resnet20 --modes eager --threads 1 --clock cpu     # on a busy machine
    python benchmarks/regularizer.py --networks digits-mlp small-cnn-16 small-cnn-32 --modes eager --batch-size 64
    python benchmarks/regularizer.py --device cuda --memory-limit 0 --output regularizer-cuda

A step is forward, backward and an SGD update. Every method has a process of its own, where its steps, plain steps and
those between penalties are timed in turn: the memory that other methods ask for would change how fast everyone's is
found. Peak memory is what a step needs beyond model, data and optimizer. ``every=10`` is the mean of one penalized
step and nine between penalties. Compiled is ``model.compile()`` with a graph for every batch size, by Inductor, which
needs a C++ compiler; its ratios are to a compiled plain step. Double backward does not go through compiled graphs, nor
do sub-batches together unless by passes="compiled": the penalty passes of "hvp" and of passes="together" run eagerly
there, and the gradient norm penalty is left out. A plain step on a CUDA device has PyTorch's defaults, TF32 in
convolutions among them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import harness
from flatminima import FisherTraceRegularizer
from flatminima.lab.networks import build_model

Step = Callable[[], object]
PLAIN, OFF = "plain step", "step between penalties (every > 1)"
RIVALS = SHARPNESS_AWARE, GRADIENT_NORM = "SAM", "gradient norm penalty by double backward"
MODES = ("eager", "compiled")


class Transformer(nn.Module):
    """Classifies 64 tokens: four layers of width 128 with four heads, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, 128)
        self.positions = nn.Parameter(0.02 * torch.randn(64, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 64) → (B, 10)."""
        logits: Tensor = self.head(self.encoder(self.tokens(tokens) + self.positions).mean(1))
        return logits


def images(name: str, batch_size: int) -> tuple[nn.Module, Tensor]:
    """One of the paper's networks, and a batch of CIFAR's shape."""
    inputs = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    return build_model(name).to(memory_format=torch.channels_last), inputs


def small_cnn(side: int, batch_size: int) -> tuple[nn.Module, Tensor]:
    """Two convolutions of 5,418 weights, as a first try has them: what a step costs beside its arithmetic is seen."""
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), *pooled)
    return model, torch.randn(batch_size, 3, side, side)


def digits_mlp(batch_size: int) -> tuple[nn.Module, Tensor]:
    """The demo's network."""
    return build_model("mlp", num_classes=10, in_channels=1), torch.randn(batch_size, 1, 8, 8)


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "cnn": lambda batch_size: images("cnn", batch_size),
    "resnet20": lambda batch_size: images("resnet20", batch_size),
    "wrn28-2": lambda batch_size: images("wrn28-2", batch_size),
    "digits-mlp": digits_mlp,
    "small-cnn-16": lambda batch_size: small_cnn(16, batch_size),
    "small-cnn-32": lambda batch_size: small_cnn(32, batch_size),
    "transformer": lambda batch_size: (Transformer(), torch.randint(256, (batch_size, 64))),
}


class Training:
    """A network, a batch and an optimizer."""

    def __init__(self, network: str, mode: str, batch_size: int, device: str) -> None:
        torch.manual_seed(0)
        model, inputs = NETWORKS[network](batch_size)
        self.model, self.inputs = model.to(device), inputs.to(device)
        if mode == "compiled":
            torch._dynamo.config.cache_size_limit = 64  # past it, graphs of further batch sizes would run eagerly
            self.model.compile(dynamic=False)
        self.targets = torch.randint(10, (batch_size,), device=device)
        optimizer = {"lr": 1e-6, "momentum": 0.9}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **optimizer)
        self.sharpness_aware = SAM(self.model.parameters(), torch.optim.SGD, rho=0.05, foreach=True, **optimizer)

    def loss(self) -> Tensor:
        """Cross entropy of the batch."""
        return F.cross_entropy(self.model(self.inputs), self.targets)

    def plain(self) -> None:
        """One ordinary step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def regularized(self, regularizer: FisherTraceRegularizer) -> None:
        """One step of Algorithm 1."""
        self.optimizer.zero_grad()
        regularizer.backward(F.cross_entropy, self.inputs, self.targets)
        self.optimizer.step()

    def sam(self) -> None:
        """Sharpness-aware minimization (Foret et al., 2021): a pass at the weights, and one at the worst place near."""

        def closure() -> Tensor:
            self.sharpness_aware.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        closure()
        self.sharpness_aware.step(closure)

    def gradient_norm_penalty(self, weight: float = 0.01) -> None:
        """L + weight ‖∇L‖ of the whole batch, by double backward; fused attention has no second derivative."""
        self.optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss()
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), create_graph=True)
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        (loss + weight * squares.sqrt()).backward()
        self.optimizer.step()


def methods(mode: str) -> dict[str, Callable[[Training], Step]]:
    """What to time, by name: what makes the step for a training."""

    def ours(**options: Any) -> Callable[[Training], Step]:
        def make(training: Training) -> Step:
            regularizer = FisherTraceRegularizer(training.model, max_grad_norm=5.0, **options)
            return lambda: training.regularized(regularizer)

        return make

    found = {PLAIN: lambda training: training.plain, OFF: ours(start_step=2**62)}
    for estimator, m, main_gradient in itertools.product(
        ("finite-difference", "hvp"), (4, 8, 16), ("sub-batches", "whole-batch")
    ):
        found[f"{estimator}, M={m}, main_gradient={main_gradient}"] = ours(
            num_sub_batches=m, estimator=estimator, main_gradient=main_gradient
        )
    for estimator, passes in (
        ("finite-difference", "together"),
        ("hvp", "together"),
        ("finite-difference", "compiled"),
    ):
        found[f"{estimator}, M=8, main_gradient=sub-batches, passes={passes}"] = ours(
            num_sub_batches=8, estimator=estimator, main_gradient="sub-batches", passes=passes
        )
    found[SHARPNESS_AWARE] = lambda training: training.sam
    if mode == "eager":
        found[GRADIENT_NORM] = lambda training: training.gradient_norm_penalty
    return found


def measure(
    method: str, network: str, mode: str, batch_size: int, device: str, repetitions: int, clock: str
) -> dict[str, Any]:
    """Seconds of the method's steps and of plain ones in turn, and its peak memory."""
    training = Training(network, mode, batch_size, device)
    known = methods(mode)
    steps = {name: known[name](training) for name in dict.fromkeys((PLAIN, OFF, method))}
    for step in steps.values():  # load and compile code, make pools and the optimizer's state, first
        step()
    peak = harness.peak_memory(steps[method], device)
    seconds = harness.interleaved(steps, repetitions, clock, device)
    result = {
        "seconds": harness.summary(seconds[method]),
        "plain_seconds": harness.summary(seconds[PLAIN]),
        "ratio": harness.ratios(seconds[method], seconds[PLAIN]),
        "peak_bytes": peak,
    }
    if method not in (PLAIN, OFF, *RIVALS):
        mixed = [(on + 9 * off) / 10 for on, off in zip(seconds[method], seconds[OFF], strict=True)]
        result["ratio_every_10"] = harness.ratios(mixed, seconds[PLAIN])
    return result


def show(method: str, row: dict[str, Any]) -> None:
    """Print a line of the table."""
    if "error" in row:
        print(f"  {method:67} fails: {row['error']}", flush=True)
        return
    ratio, peak = row["ratio"], row["peak_bytes"]
    spread = f"({ratio['min']:.2f} – {ratio['max']:.2f})"
    every_10 = f"{row['ratio_every_10']['median']:.2f}" if "ratio_every_10" in row else ""
    memory = f"{peak / 2**20:6,.0f} MiB" if peak is not None else ""
    print(f"  {method:67} {ratio['median']:5.2f} {spread:16} every=10: {every_10:5} {memory}", flush=True)


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = harness.parse(parser)
    record: dict[str, Any] = {
        "environment": harness.environment(options, options.device),
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        "networks": {},
    }
    for network, mode in itertools.product(options.networks, options.modes):
        name = network if mode == "eager" else f"{network}, {mode}"
        print(f"\n{name}")
        rows = record["networks"][name] = {}
        for method in methods(mode):
            what = method, network, mode, options.batch_size, options.device, options.repetitions, options.clock
            rows[method] = harness.in_own_process(measure, *what, **harness.limits(options))
            show(method, rows[method])
            harness.write_json(options.output or "regularizer", record)


if __name__ == "__main__":
    main()
