"""What a step with the regularizer costs, as a ratio to a plain step of the same batch, beside SAM and double backward.

    python benchmarks/regularizer.py                                                 # half an hour on two cores
    python benchmarks/regularizer.py --networks resnet20 --threads 1 --clock cpu     # on a busy machine

A step is forward, backward and an SGD update. Times are of steps interleaved in one process, peak memory that of a
fresh process each, beyond model and data. ``every=10`` is the mean of one penalized step and nine between penalties.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import _harness
from flatminima import FisherTraceRegularizer
from flatminima.lab.models import build_model

Step = Callable[[], object]
NETWORKS = ("cnn", "resnet20", "wrn28-2")
PLAIN, OFF = "plain step", "step between penalties (every > 1)"


class Training:
    """A network, a batch of CIFAR's shape and an optimizer."""

    def __init__(self, network: str, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = build_model(network).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        self.inputs = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
        self.targets = torch.randint(10, (batch_size,))

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

    def sam(self, rho: float = 0.05) -> None:
        """Sharpness-aware minimization (Foret et al., 2021), as davda54/sam does it."""
        parameters = list(self.model.parameters())
        self.optimizer.zero_grad()
        self.loss().backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, torch._foreach_mul([p.grad for p in parameters], rho / (norm + 1e-12)))
        self.optimizer.zero_grad()
        self.loss().backward()
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)
        self.optimizer.step()

    def gradient_norm_penalty(self, weight: float = 0.01) -> None:
        """L + weight ‖∇L‖ of the whole batch, by double backward."""
        self.optimizer.zero_grad()
        loss = self.loss()
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), create_graph=True)
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        (loss + weight * squares.sqrt()).backward()
        self.optimizer.step()


def methods(training: Training) -> dict[str, Step]:
    """What to time, by name."""

    def ours(**options: Any) -> Step:
        regularizer = FisherTraceRegularizer(training.model, max_grad_norm=5.0, **options)
        return lambda: training.regularized(regularizer)

    found: dict[str, Step] = {PLAIN: training.plain, OFF: ours(start_step=2**62)}
    for estimator in ("finite-difference", "hvp"):
        for m in (4, 8, 16):
            found[f"{estimator}, M={m}, main_gradient=sub-batches"] = ours(
                num_sub_batches=m, estimator=estimator, main_gradient="sub-batches"
            )
        found[f"{estimator}, M=8, main_gradient=whole-batch"] = ours(num_sub_batches=8, estimator=estimator)
    found["SAM"] = training.sam
    found["gradient norm penalty by double backward"] = training.gradient_norm_penalty
    return found


def memory(network: str, batch_size: int, method: str) -> dict[str, Any]:
    """Peak memory of one step in this process; optimizer state and code are there already."""
    training = Training(network, batch_size)
    step = methods(training)[method]
    whole = training.inputs, training.targets
    training.inputs, training.targets = training.inputs[:32], training.targets[:32]
    step()
    training.inputs, training.targets = whole
    return {"peak_bytes": _harness.peak_memory(step)}


def times(network: str, batch_size: int, repetitions: int, clock: str) -> dict[str, Any]:
    """Seconds per step by method."""
    training = Training(network, batch_size)
    steps = methods(training)
    whole = training.inputs, training.targets
    training.inputs, training.targets = training.inputs[:32], training.targets[:32]
    for step in steps.values():  # load code and make pools first
        step()
    training.inputs, training.targets = whole
    return _harness.interleaved(steps, repetitions, clock)


def run_network(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of every method on one network."""
    limits, batch_size = _harness.limits(options), options.batch_size
    seconds = _harness.in_own_process(times, network, batch_size, options.repetitions, options.clock, **limits)
    if "error" in seconds:
        return seconds
    result: dict[str, Any] = {}
    for name, values in seconds.items():
        result[name] = {
            "seconds": _harness.summary(values),
            "ratio": _harness.ratios(values, seconds[PLAIN]),
        }
        if options.memory:
            result[name] |= _harness.in_own_process(memory, network, batch_size, name, **limits)
        if name not in (PLAIN, OFF, "SAM", "gradient norm penalty by double backward"):
            mixed = [(on + 9 * off) / 10 for on, off in zip(values, seconds[OFF], strict=True)]
            result[name]["ratio_every_10"] = _harness.ratios(mixed, seconds[PLAIN])
    return result


def show(network: str, result: dict[str, Any]) -> None:
    """Print one network's table."""
    print(f"\n{network}")
    if "error" in result:
        print(f"  fails: {result['error']}")
        return
    for name, row in result.items():
        ratio, peak = row["ratio"], row.get("peak_bytes")
        every_10 = f"{row['ratio_every_10']['median']:.2f}" if "ratio_every_10" in row else ""
        memory_column = f"{peak / 2**20:6,.0f} MiB" if peak is not None else ""
        spread = f"({ratio['min']:.2f} – {ratio['max']:.2f})"
        print(f"  {name:50} {ratio['median']:5.2f} {spread:16} every=10: {every_10:5} {memory_column}", flush=True)


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    options = _harness.parse(parser)
    record: dict[str, Any] = {
        "environment": _harness.environment(options),
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        "networks": {},
    }
    for network in options.networks:
        record["networks"][network] = run_network(network, options)
        show(network, record["networks"][network])
        _harness.write_json(options.output or "regularizer", record)


if __name__ == "__main__":
    main()
