"""How the finite difference of Eq. 6 behaves with α, precision and activation; a record and a figure.

    python benchmarks/finite_differences.py        # a minute or two on two cores

One penalty, from the same sub-batches every time, is computed as a finite difference in float64, float32 and with
products rounded to bfloat16 (what TF32 or autocast would do to it), and exactly as α · mean_i H_i g_i in float64.
Left: distance of the finite difference from that limit, in units of the limit. In float64 it is truncation: it falls
with α for smooth activations, while with ReLU the kinks crossed by the step leave noise. In float32 rounding grows as α
shrinks; dots are the rounding share that the regularizer's diagnostics estimate. Right: cosine with the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from flatminima import FisherTraceRegularizer
from flatminima.regularizer import Penalty

mpl.use("Agg")
import matplotlib.pyplot as plt

ALPHAS = [10.0**exponent for exponent in (-7, -6, -5, -4, -3, -2, -1)]
ACTIVATIONS = {"ReLU": nn.ReLU, "GELU": nn.GELU, "Softplus": nn.Softplus}
PRECISIONS = ("float64", "float32", "bfloat16")
SUB_BATCHES = 4


def network(activation: type[nn.Module]) -> nn.Module:
    """A small convolutional network with BatchNorm for 3×16×16 images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, stride=1 + (outputs > 16), bias=False)]
        layers += [nn.BatchNorm2d(outputs), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def data() -> tuple[Tensor, Tensor]:
    """Images whose classes can be learned."""
    inputs, targets = torch.randn(256, 3, 16, 16), torch.arange(256) % 10
    prototypes = torch.randn(10, 3, 16, 16)
    return inputs + prototypes[targets], targets


def trained(model: nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> nn.Module:
    """Some steps of SGD."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


class RoundedProducts(TorchDispatchMode):
    """Rounds the operands of convolutions and matrix products to bfloat16, as reduced-precision hardware does."""

    OPERATIONS = (
        torch.ops.aten.convolution.default,
        torch.ops.aten.convolution_backward.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
    )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Round the operands."""
        if function in self.OPERATIONS:
            args = tuple(_rounded(argument) for argument in args)
        return function(*args, **(kwargs or {}))


def _rounded(argument: Any) -> Any:
    is_float = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.bfloat16().to(argument.dtype) if is_float else argument


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[torch.dtype]:
    """The precision of products; yields the type of everything else."""
    with RoundedProducts() if precision == "bfloat16" else contextlib.nullcontext():
        yield torch.float64 if precision == "float64" else torch.float32


def penalty_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, alpha: float, **options: Any
) -> tuple[Penalty, float]:
    """The penalty on the same sub-batches every time, and the estimated rounding share."""
    torch.manual_seed(0)
    regularizer = FisherTraceRegularizer(model, alpha=alpha, num_sub_batches=SUB_BATCHES, **options)
    penalty = regularizer.penalize(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (inputs, targets))
    assert penalty is not None
    return penalty, regularizer.diagnostics()["rounding_share"]


def compare(limit: list[Tensor], difference: list[Tensor]) -> dict[str, float]:
    """Distance in units of the limit, and cosine (0 where the difference has vanished)."""
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (limit, difference))
    return {
        "relative_error": float((a - b).norm() / a.norm()),
        "cosine": float(a @ b / (a.norm() * b.norm())) if b.norm() > 0 else 0.0,
    }


def sweep(activation: str, steps: int) -> dict[str, list[dict[str, float]]]:
    """All α and precisions, for a network after ``steps`` of training."""
    torch.manual_seed(0)
    inputs, targets = data()
    model = trained(network(ACTIVATIONS[activation]), inputs, targets, steps)
    rows: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    exact, _ = penalty_of(copy.deepcopy(model).double(), inputs.double(), targets, 1.0, estimator="hvp")
    for alpha in ALPHAS:
        limit = [alpha * gradient for gradient in exact.gradient]
        for precision in PRECISIONS:
            with arithmetic(precision) as dtype:
                copied = copy.deepcopy(model).to(dtype)
                penalty, share = penalty_of(copied, inputs.to(dtype), targets, alpha)
            rows[precision].append(
                {"alpha": alpha, **compare(limit, penalty.gradient), "estimated_rounding_share": share}
            )
    return rows


def draw(results: dict[str, dict[str, dict[str, list[dict[str, float]]]]], path: str) -> None:
    """One row of panels per stage of training: error and cosine against α."""
    colors = dict(zip(ACTIVATIONS, ("#c44e52", "#4c72b0", "#55a868"), strict=True))
    styles = {"float64": ":", "float32": "-", "bfloat16": "--"}
    figure, axes = plt.subplots(len(results), 2, figsize=(11, 4 * len(results)), layout="constrained", squeeze=False)
    for (stage, by_activation), (left, right) in zip(results.items(), axes, strict=True):
        for activation, by_precision in by_activation.items():
            for precision, rows in by_precision.items():
                style = {"color": colors[activation], "linestyle": styles[precision]}
                alphas = [row["alpha"] for row in rows]
                label = f"{activation}, {precision}"
                left.loglog(alphas, [row["relative_error"] for row in rows], label=label, **style)
                right.semilogx(alphas, [row["cosine"] for row in rows], **style)
                if precision == "float32":
                    shares = [row["estimated_rounding_share"] for row in rows]
                    left.loglog(alphas, shares, ".", color=colors[activation])
        left.axvline(1e-4, color="0.8", zorder=0)
        right.axvline(1e-4, color="0.8", zorder=0)
        left.set(title=f"{stage}: ‖∇R − αHg‖ / ‖αHg‖", xlabel="α (the paper's: 1e-4)")
        right.set(title=f"{stage}: cosine of ∇R with αHg", xlabel="α", ylim=(-0.1, 1.05))
    axes[0][0].legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the sweep; write the record and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = harness.parse(parser)
    torch.set_num_threads(options.threads)
    stages = {"at initialization": 0, "after 60 steps": 60}
    results: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {stage: {} for stage in stages}
    record = {"environment": harness.environment(options), "sub_batches": SUB_BATCHES, "stages": results}
    for stage, steps in stages.items():
        for name in ACTIVATIONS:
            results[stage][name] = sweep(name, steps)
            path = harness.write_json(options.output or "finite_differences", record)
    draw(results, str(path.with_suffix(".png")))
    for stage, by_activation in results.items():
        for activation, by_precision in by_activation.items():
            for precision, rows in by_precision.items():
                found = "  ".join(f"{row['relative_error']:8.1e}/{row['cosine']:5.2f}" for row in rows)
                print(f"{stage:18} {activation:9} {precision:9} {found}")


if __name__ == "__main__":
    main()
