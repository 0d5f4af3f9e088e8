"""‖J_x[f_w(x)]‖₂², the input Jacobian's spectral norm: ours and the ways others take.

    python benchmarks/robustness.py
    python benchmarks/robustness.py --classes 1000 --samples 4 --threads 2 --output robustness-1000

Times are ratios to ours, of calls interleaved in one process; peak memory is that of a fresh process each, beyond
model and data. Errors are relative, against ours of the same network in float64.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

import harness
from flatminima.lab.networks import build_model
from flatminima.measures import input_jacobian_norms

OURS = "flatminima"
POWER_TOLERANCE, POWER_STEPS = 1e-6, 200
"""Power iteration stops when no sample's value changes by more than the first, relative, or after so many steps."""


def ours(model: nn.Module, x: Tensor) -> Tensor:
    """K − 1 backward passes up to 40 classes, then Lanczos iterations; and a Gram matrix of as many rows."""
    return input_jacobian_norms(model, x)


def jacrev_of_each(model: nn.Module, x: Tensor) -> Tensor:
    """``vmap(jacrev)``: the K × D Jacobians at once, then their singular values."""
    jacobians = vmap(jacrev(lambda one: model(one[None])[0].softmax(0)))(x)
    return torch.linalg.matrix_norm(jacobians.flatten(2), 2).square()


def batched_backward(model: nn.Module, x: Tensor) -> Tensor:
    """The K rows by one vectorized backward pass, ``is_grads_batched``; then a K × K Gram matrix."""
    x = x.detach().requires_grad_()
    p = model(x).softmax(1)
    each_class = torch.eye(p.shape[1])[:, None].expand(-1, len(x), -1)
    (rows,) = torch.autograd.grad(p, x, each_class, is_grads_batched=True)
    jacobians = rows.flatten(2).transpose(0, 1)
    return torch.linalg.eigvalsh(jacobians @ jacobians.transpose(1, 2))[:, -1]


def one_backward_per_class(model: nn.Module, x: Tensor) -> Tensor:
    """K backward passes from the softmax's outputs; then a K × K Gram matrix."""
    x = x.detach().requires_grad_()
    p = model(x).softmax(1)
    rows = [torch.autograd.grad(p[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(p.shape[1])]
    jacobians = torch.stack(rows, 1)
    return torch.linalg.eigvalsh(jacobians @ jacobians.transpose(1, 2))[:, -1]


def power_iteration(model: nn.Module, x: Tensor) -> Tensor:
    """All samples' power iterations side by side, one ``jvp`` and one ``vjp`` a step."""

    def probabilities(z: Tensor) -> Tensor:
        return functional_call(model, {}, (z,)).softmax(1)

    shape = (-1,) + (1,) * (x.dim() - 1)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    _, pull_back = vjp(probabilities, x)
    value = x.new_zeros(len(x))
    for _ in range(POWER_STEPS):
        direction = direction / direction.flatten(1).norm(dim=1).view(shape)
        _, pushed = jvp(probabilities, (x,), (direction,))
        previous, value = value, pushed.square().sum(1)
        if ((value - previous).abs() <= POWER_TOLERANCE * value).all():
            break
        (direction,) = pull_back(pushed)
    return value


METHODS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    OURS: ours,
    "K backward passes": one_backward_per_class,
    "is_grads_batched": batched_backward,
    "vmap(jacrev)": jacrev_of_each,
    "power iteration": power_iteration,
}


def make(network: str, classes: int, samples: int, sharpness: float) -> tuple[nn.Module, Tensor]:
    """The network in eval mode with frozen parameters, and its inputs; ``sharpness`` multiplies the logits."""
    torch.manual_seed(0)
    model, x = build_model(network, num_classes=classes), torch.randn(samples, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    harness.sharpen(model, sharpness)
    return model.eval().requires_grad_(False), x


def check(method: str, *made: Any) -> dict[str, Any]:
    """One call in this process: its peak memory, then its result against ours in float64."""
    model, x = make(*made)
    METHODS[method](model, x[:2])
    results: list[Tensor] = []
    peak = harness.peak_memory(lambda: results.append(METHODS[method](model, x)))
    expected = input_jacobian_norms(copy.deepcopy(model).double(), x.double())
    return {"peak_bytes": peak, "relative_error": ((results[0] - expected).abs() / expected).max().item()}


def time_all(methods: list[str], repetitions: int, clock: str, *made: Any) -> dict[str, Any]:
    """Interleaved seconds, and those of one forward pass and one backward pass to the inputs."""
    model, x = make(*made)

    def one_pass() -> None:
        z = x.detach().requires_grad_()
        torch.autograd.grad(model(z).sum(), z)

    calls: dict[str, Callable[[], object]] = {name: lambda name=name: METHODS[name](model, x) for name in methods}
    calls["forward-backward"] = one_pass
    for call in calls.values():
        call()
    return {"seconds": harness.interleaved(calls, repetitions, clock)}


def run(methods: list[str], repetitions: int, clock: str, made: tuple[Any, ...], limits: dict[str, Any]) -> dict:
    """Everything about one network and number of classes."""
    outcomes = {method: harness.in_own_process(check, method, *made, **limits) for method in methods}
    working = [method for method, outcome in outcomes.items() if "error" not in outcome]
    timed = harness.in_own_process(time_all, working, repetitions, clock, *made, **limits)
    if "error" in timed:
        return {"methods": outcomes, "error": timed["error"]}
    seconds = timed["seconds"]
    for method in working:
        outcomes[method] |= {
            "seconds": harness.summary(seconds[method]),
            "ratio": harness.ratios(seconds[method], seconds[OURS]),
            "passes": harness.ratios(seconds[method], seconds["forward-backward"]),
        }
    return {"methods": outcomes}


def show(console: Console, title: str, result: dict[str, Any]) -> None:
    """Print one table."""
    table = Table(title=title)
    for heading in ("method", "time / ours", "min – max", "forward-backwards", "peak memory", "relative error"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, outcome in result["methods"].items():
        if "error" in outcome:
            table.add_row(method, f"fails: {outcome['error'][:80]}")
            continue
        ratio, peak = outcome.get("ratio"), outcome["peak_bytes"]
        table.add_row(
            method,
            f"{ratio['median']:.2f}" if ratio else "",
            f"{ratio['min']:.2f} – {ratio['max']:.2f}" if ratio else "",
            f"{outcome['passes']['median']:.1f}" if ratio else "",
            f"{peak / 2**20:,.0f} MiB" if peak is not None else "",
            f"{outcome['relative_error']:.0e}",
        )
    console.print(table)
    if "error" in result:
        console.print(f"  no times: {result['error']}")


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1.0, 20.0], help="factors on the last layer")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = harness.parse(parser)
    methods = [OURS, *(method for method in options.methods if method != OURS)]
    console = Console(width=130)
    record: dict[str, Any] = {"environment": harness.environment(options), "results": []}
    for classes in options.classes:
        for sharpness in options.sharpness:
            made = (options.network, classes, options.samples, sharpness)
            result = run(methods, options.repetitions, options.clock, made, harness.limits(options))
            title = f"{options.network}, K = {classes}, logits × {sharpness:g}, {options.samples} samples"
            show(console, title, result)
            setting = dict(zip(("network", "classes", "samples", "sharpness"), made, strict=True))
            record["results"].append(setting | result)
            path = harness.write_json(options.output or "robustness", record)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
