"""ξ = JJᵀ by every library that can: time and memory against a plain forward and backward pass of the same samples.

    python benchmarks/gram.py                          # the paper's four networks, about ten minutes on two cores
    python benchmarks/gram.py --networks resnet50 vit-s gpt2 --threads 2

Times are ratios to the plain pass, of calls interleaved in one process; peak memory is that of a fresh process each,
beyond model and data. Every result is checked against ours. The floor below each table is what no method can avoid.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import harness
from flatminima.gramian import Plan, factored_gram, plan_for, times_own_transpose, times_transposes
from flatminima.lab.networks import build_model
from flatminima.losses import CrossEntropy
from support.peers import PEERS, PerSampleLoss

OURS, PLAIN = "flatminima", "forward-backward"
TOLERANCE = 1e-3
"""Entries of ξ may differ by this much, relative to the gradients' norms."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-sample cross entropy."""
    return F.cross_entropy(logits, targets, reduction="none")


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """A sequence's mean cross entropy of every next token."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


class Logits(nn.Module):
    """A Hugging Face model that returns its logits alone, which every peer can take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.model(x).logits
        return logits


def resnet50() -> nn.Module:
    """ResNet-50 of Hugging Face, random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000)))


def vit_s() -> nn.Module:
    """ViT-S/16 of Hugging Face, random weights, no dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(
        ViTForImageClassification(
            ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
        )
    )


def gpt2() -> nn.Module:
    """GPT-2 small of Hugging Face, random weights, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False)))


@dataclass(frozen=True)
class Network:
    """A network with its data: ``samples`` images of ``size`` pixels, or sequences of ``size`` tokens."""

    build: Callable[[], nn.Module]
    samples: int
    size: int
    tokens: bool = False
    classes: int = 1000

    def make(self, samples: int | None = None) -> tuple[nn.Module, Tensor, Tensor, PerSampleLoss]:
        """The model in eval mode, its BatchNorm statistics those of the data; inputs, targets, per-sample loss."""
        torch.manual_seed(0)
        model, n = self.build(), samples or self.samples
        if self.tokens:
            x = torch.randint(0, 50257, (n, self.size))
            return model.eval(), x, x, next_token
        x, y = torch.randn(n, 3, self.size, self.size), torch.randint(0, self.classes, (n,))
        with torch.no_grad():
            for _ in range(3):
                model.train()(x[:32])
        return model.eval(), x, y, cross_entropy


NETWORKS = {
    "cnn": Network(lambda: build_model("cnn"), 100, 32, classes=10),
    "resnet20": Network(lambda: build_model("resnet20"), 100, 32, classes=10),
    "wrn28-2": Network(lambda: build_model("wrn28-2"), 100, 32, classes=10),
    "densenet-bc-100": Network(lambda: build_model("densenet-bc-100"), 100, 32, classes=10),
    "resnet50": Network(resnet50, 16, 224),
    "vit-s": Network(vit_s, 16, 224),
    "gpt2": Network(gpt2, 4, 128, tokens=True),
}
PAPERS = ["cnn", "resnet20", "wrn28-2", "densenet-bc-100"]
NEEDS_TRANSFORMERS = {"resnet50", "vit-s", "gpt2"}


def ours(model: nn.Module, loss: PerSampleLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """What this project does for every subset, without the plan and the spot check, which ``measure`` makes once."""
    named = CrossEntropy(next_token=loss is next_token)
    plans: dict[int, Plan] = {}

    def gram_of(x: Tensor, y: Tensor) -> Tensor:
        if len(x) not in plans:
            plans[len(x)] = plan_for(model, x)
        return factored_gram(model, x, y, loss=named, plan=plans[len(x)], spot_check=False).matrix()

    return gram_of


def plain(model: nn.Module, loss: PerSampleLoss) -> Callable[[Tensor, Tensor], Any]:
    """One forward pass and one backward pass to all parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda x, y: torch.autograd.grad(loss(model(x), y).sum(), parameters)


METHODS = {PLAIN: plain, OURS: ours, **PEERS}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of entries, relative to the norms of the two gradients."""
    norms = expected.diagonal().sqrt()
    return ((actual - expected).abs() / (norms[:, None] * norms)).max().item()


def check(network: str, method: str) -> dict[str, Any]:
    """One call in this process: its peak memory, then its result against ours."""
    model, x, y, loss = NETWORKS[network].make()
    call = METHODS[method](copy.deepcopy(model), loss)
    call(x[:2].clone(), y[:2])  # load code and make pools first
    results: list[Any] = []
    peak = harness.peak_memory(lambda: results.append(call(x, y)))
    if method in (PLAIN, OURS):
        return {"peak_bytes": peak}
    return {"peak_bytes": peak, "relative_error": relative_error(results[0], ours(model, loss)(x, y))}


def time_all(network: str, methods: list[str], repetitions: int, clock: str) -> dict[str, Any]:
    """Interleaved seconds of the methods and of the floor's pieces."""
    model, x, y, loss = NETWORKS[network].make()
    calls: dict[str, Callable[[], object]] = dict(Floor(model, x, y, loss).pieces())
    for method in methods:
        call = METHODS[method](copy.deepcopy(model), loss)
        calls[method] = lambda call=call: call(x, y)
    for call in calls.values():
        call()
    return {"seconds": harness.interleaved(calls, repetitions, clock)}


class Floor:
    """What ξ costs at least, piece by piece.

    The rows of J take the floating-point operations of the plain pass's weight gradients; beside them, ξ takes the
    products J_p J_pᵀ.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss: PerSampleLoss) -> None:
        self.model, self.x, self.y, self.loss = copy.deepcopy(model).requires_grad_(False), x, y, loss
        self.sizes = [p.numel() for p in model.parameters()]
        self.row_products: list[tuple[int, int, int, int]] = []  # (batch, out, positions, in)
        self.roots: list[Tensor] = []
        layers = [module for module in self.model.modules() if list(module.parameters(recurse=False))]
        self.first = layers[0]
        handles = [layer.register_forward_hook(self._note_rows) for layer in layers]
        self.forward()
        for handle in handles:
            handle.remove()

    def pieces(self) -> dict[str, Callable[[], object]]:
        """The timed pieces by name."""
        return {
            "forward": self.forward,
            "forward, backward to inputs": self.forward_and_backward_to_inputs,
            "rows": self.rows,
            "products": self.products,
        }

    def forward(self) -> Tensor:
        """The forward pass, recorded for a backward pass that ends at the first layer's output."""
        self.roots.clear()
        handle = self.first.register_forward_hook(lambda _, args, output: self.roots.append(output.requires_grad_()))
        logits: Tensor = self.model(self.x)
        handle.remove()
        return logits

    def forward_and_backward_to_inputs(self) -> Any:
        """Both passes with the parameters frozen: gradients of activations only."""
        value = self.loss(self.forward(), self.y).sum()
        return torch.autograd.grad(value, self.roots[:1])

    def rows(self) -> None:
        """The arithmetic of the rows alone: per layer one batched product of operands that lie ready."""
        for batch, out, positions, features in self.row_products:
            times_transposes(_ones(batch, out, positions), _ones(batch, features, positions))

    def products(self) -> None:
        """J_p J_pᵀ of rows that lie ready."""
        for size in self.sizes:
            times_own_transpose(_ones(len(self.y), size))

    def flops(self) -> dict[str, float]:
        """Floating-point operations by piece: those of matrix products and convolutions."""
        rows = sum(2 * math.prod(shape) for shape in self.row_products)
        with FlopCounterMode(display=False) as counter:
            self.model(self.x)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            plain(copy.deepcopy(self.model).requires_grad_(True), self.loss)(self.x, self.y)
        everything = counter.get_total_flops()
        n = len(self.y)
        return {
            "forward": forward,
            "backward to inputs": everything - forward - rows,  # the weight gradients' operations are the rows'
            "rows": rows,
            "products": n * (n + 1) * sum(self.sizes),  # ξ is symmetric
        }

    def _note_rows(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        n = len(self.y)
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Conv2d):
            groups = module.groups
            shape = (n * groups, weight.shape[0] // groups, output[0, 0].numel(), weight[0].numel())
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # the latter of transformers
            shape = (n, output.shape[-1], output.numel() // n // output.shape[-1], args[0].shape[-1])
        else:
            return
        self.row_products.append(shape)


_scratch = torch.ones(0)


def _ones(*shape: int) -> Tensor:
    """A tensor of ones that costs nothing to make twice."""
    global _scratch
    if _scratch.numel() < math.prod(shape):
        _scratch = torch.ones(math.prod(shape))
    return _scratch[: math.prod(shape)].view(shape)


def count_flops(network: str) -> dict[str, Any]:
    """The floor's operations, and the number of parameters."""
    model, x, y, loss = NETWORKS[network].make()
    return {"flops": Floor(model, x, y, loss).flops(), "parameters": sum(p.numel() for p in model.parameters())}


def run_network(network: str, methods: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one network."""
    limits = harness.limits(options)
    result: dict[str, Any] = {"samples": NETWORKS[network].samples, "methods": {}}
    result |= harness.in_own_process(count_flops, network, **limits)
    for method in methods:
        print(f"{network}: {method} ...", flush=True)
        result["methods"][method] = harness.in_own_process(check, network, method, **limits)
    working = [method for method, outcome in result["methods"].items() if "error" not in outcome]
    print(f"{network}: timing {', '.join(working)} ...", flush=True)
    timed = harness.in_own_process(time_all, network, working, options.repetitions, options.clock, **limits)
    if "error" in timed:
        return result | {"error": timed["error"]}
    seconds = timed["seconds"]
    for method in working:
        result["methods"][method] |= {
            "seconds": harness.summary(seconds[method]),
            "ratio": harness.ratios(seconds[method], seconds[PLAIN]),
        }
    result["floor"] = floor_in_ratios(seconds)
    return result


def floor_in_ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The pieces as fractions of the plain pass (medians), and two floors that they add up to."""
    both = harness.ratios(seconds["forward, backward to inputs"], seconds[PLAIN])["median"]
    pieces = {name: harness.ratios(seconds[name], seconds[PLAIN])["median"] for name in ("forward", "rows", "products")}
    return {
        "forward": pieces["forward"],
        "backward to inputs": both - pieces["forward"],
        "weight gradients of the plain pass": 1 - both,
        "rows, arithmetic alone": pieces["rows"],
        "products": pieces["products"],
        "floor with the plain pass's weight gradients": 1 + pieces["products"],
        "floor with the rows' arithmetic": both + pieces["rows"] + pieces["products"],
    }


def show(console: Console, network: str, result: dict[str, Any]) -> None:
    """Print one network's table and floor."""
    table = Table(title=f"{network}: {result['samples']} samples, {result.get('parameters', 0):,} parameters")
    for heading in ("method", "time / forward-backward", "min – max", "peak memory", "ξ against ours"):
        table.add_column(heading, justify="left" if heading in ("method", "ξ against ours") else "right")
    for method, outcome in result["methods"].items():
        if "error" in outcome:
            table.add_row(method, "", "", "", f"fails: {outcome['error'][:90]}")
            continue
        ratio, peak = outcome.get("ratio"), outcome["peak_bytes"]
        error = outcome.get("relative_error")
        table.add_row(
            method,
            f"{ratio['median']:.2f}" if ratio else "",
            f"{ratio['min']:.2f} – {ratio['max']:.2f}" if ratio else "",
            f"{peak / 2**20:,.0f} MiB" if peak is not None else "",
            "" if error is None else f"{'wrong' if not error <= TOLERANCE else 'same'} ({error:.0e})",
        )
    console.print(table)
    if "floor" in result:
        console.print("  of the plain pass: " + ", ".join(f"{k} {v:.2f}" for k, v in result["floor"].items()))
    if "flops" in result:
        console.print("  GFLOP: " + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in result["flops"].items()))
    if "error" in result:
        console.print(f"  no times: {result['error']}")


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=PAPERS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = harness.parse(parser)
    methods = [PLAIN, *(method for method in options.methods if method != PLAIN)]
    console = Console(width=150)
    record: dict[str, Any] = {"environment": harness.environment(options), "networks": {}}
    for network in options.networks:
        if network in NEEDS_TRANSFORMERS and not importlib.util.find_spec("transformers"):
            console.print(f"{network}: skipped, transformers is not installed")
            continue
        record["networks"][network] = run_network(network, methods, options)
        show(console, network, record["networks"][network])
        path = harness.write_json(options.output or "gram", record)
    if record["networks"]:
        console.print(f"written to {path}")


if __name__ == "__main__":
    main()
