"""``measure`` from end to end: what a trial takes by part, beside the same job with the libraries that one would take.

    python benchmarks/measure.py --threads 1 --clock cpu        # the paper's four networks, on a busy machine
    python benchmarks/measure.py --networks resnet50 vit-s gpt2 --trials 3
    python benchmarks/measure.py --networks resnet50 --sharpness 20    # p less uniform than by random weights
    python benchmarks/measure.py --device cuda --memory-limit 0 --output measure-cuda

One call of ``measure`` is timed from within: by its data set, which sees every fetch, and by a clock around every
measure. Before each trial the data set takes a plain forward and backward pass of the same samples, and ξ by itself;
the trial's parts are ratios to that pass. The first trial, which checks ξ against plain autograd, stands alone, as does
what is done once. The training loss is a ratio to plain passes of as many samples. Other libraries' jobs are timed each
in a process of its own, in turn with plain passes: ξ by per-sample gradients and its slogdet, or the largest eigenvalue
of the empirical Fisher matrix.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import flatminima
import harness
from flatminima.losses import CrossEntropy
from flatminima.measures import CATALOGUE
from gram import NEEDS_TRANSFORMERS, NETWORKS, PAPERS, PLAIN, next_token, ours, plain
from support.peers import PEERS, PerSampleLoss

XI = "ξ by itself"
TRIAL, NEXT_TO_XI = "trial", "all but robustness"
ROBUSTNESS = "robustness"
SUBSETS = 2
"""The training set is so many times as large as a subset."""


class Watched:
    """A training set that times one call of ``measure``, whose parts lie between its fetches.

    Attributes:
        trials: by trial, seconds of every part.
        once: seconds of what is done once.
    """

    def __init__(
        self, x: Tensor, y: Tensor, references: dict[str, Callable[[Tensor, Tensor], object]], now: Callable[[], float]
    ) -> None:
        self.x, self.y, self.references, self.now = x, y, references, now
        self.trials: list[dict[str, float]] = []
        self.once = {"preparation": 0.0, "training loss": 0.0}
        self._phase, self._prepared = "preparation", False
        self._since = now()

    def __len__(self) -> int:
        return len(self.y)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The samples at ``indices``; ranges up to the last are for the training loss, lists after them are trials'."""
        self.end_of_phase()
        if isinstance(indices, range):
            self._phase = "training loss"
            self._prepared = indices.stop == len(self)
            self.trials.clear()  # of a set so small that looking for random augmentation has seen all of it
        elif self._prepared:
            self._phase = TRIAL
            self.trials.append(dict.fromkeys(("fetching", ROBUSTNESS), 0.0))
            for name, reference in self.references.items():
                with self.timed(name):
                    reference(self.x[list(indices)], self.y[list(indices)])
        self._since = self.now()
        chosen = torch.as_tensor(indices, device=self.x.device)
        batch = self.x[chosen], self.y[chosen]
        if self._phase == TRIAL:
            self.trials[-1]["fetching"] = self.now() - self._since
        return batch

    def end_of_phase(self) -> None:
        """Whatever is being done ends here."""
        seconds = self.now() - self._since
        if self._phase == TRIAL:
            self.trials[-1][TRIAL] = seconds
        else:
            self.once[self._phase] += seconds
        if self._phase == "training loss":  # its last fetch is followed by what else is done once
            self._phase = "preparation"
        self._since = self.now()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of this block to a part of the present trial."""
        start = self.now()
        yield
        self.trials[-1][part] = self.trials[-1].get(part, 0.0) + self.now() - start

    def watching_measures(self) -> None:
        """Put a clock around every measure of the catalogue."""

        def watched(function: Callable[[Any], float], part: str) -> Callable[[Any], float]:
            def timed(trial: Any) -> float:
                with self.timed(part):
                    return function(trial)

            return timed

        for name, measure in CATALOGUE.items():
            part = ROBUSTNESS if name == ROBUSTNESS else "measures of ξ"
            CATALOGUE[name] = dataclasses.replace(measure, function=watched(measure.function, part))


def trials_of(network: str, trials: int, sharpness: float, clock: str, device: str) -> dict[str, Any]:
    """One call of ``measure``, by part, in ratios to plain passes; ``sharpness`` multiplies the logits."""
    n = NETWORKS[network].samples
    model, x, y, loss = NETWORKS[network].make(SUBSETS * n)
    harness.sharpen(model, sharpness)
    model, x, y = model.to(device), x.to(device), y.to(device)
    references = {PLAIN: plain(model, loss), XI: ours(model, loss)}
    for reference in references.values():
        reference(x[:n], y[:n])
    data = Watched(x, y, references, harness.clock_of(clock, device))
    data.watching_measures()
    named = CrossEntropy(next_token=loss is next_token)
    with harness.warnings_ignored():  # random weights are no minimum
        flatminima.measure(
            model, data, loss=named, subset_size=n, trials=trials + 1, on_singular="skip", progress=False
        )
    data.end_of_phase()
    first, *others = data.trials
    plain_seconds = [trial[PLAIN] for trial in others]
    parts = {
        XI: [t[XI] for t in others],
        TRIAL: [t[TRIAL] for t in others],
        "fetching": [t["fetching"] for t in others],
        "measures of ξ": [t["measures of ξ"] for t in others],
        ROBUSTNESS: [t[ROBUSTNESS] for t in others],
        NEXT_TO_XI: [t[TRIAL] - t[ROBUSTNESS] for t in others],
    }
    once = {
        "training loss": data.once["training loss"] / SUBSETS,
        "preparation": data.once["preparation"],
        "first trial, with its checks": first[TRIAL],
    }
    return {
        "largest probability": _largest_probability(model, x),
        "seconds": harness.summary(plain_seconds),
        "parts": {name: harness.ratios(values, plain_seconds) for name, values in parts.items()},
        "all but robustness / ξ by itself": harness.ratios(parts[NEXT_TO_XI], parts[XI]),
        "once": {name: harness.ratios([seconds] * len(others), plain_seconds) for name, seconds in once.items()},
    }


@torch.no_grad()
def _largest_probability(model: nn.Module, x: Tensor) -> float:
    """The mean over samples (and tokens): how nearly p is one-hot, on which the iterations of the robustness depend."""
    logits: Tensor = model(x)
    return logits.softmax(-1).amax(-1).mean().item()


def slogdet_by(peer: str) -> Callable[[nn.Module, PerSampleLoss], Callable[[Tensor, Tensor], object]]:
    """Ln det ξ, with ξ by a peer."""

    def make(model: nn.Module, loss: PerSampleLoss) -> Callable[[Tensor, Tensor], object]:
        gram_of = PEERS[peer](model, loss)
        return lambda x, y: torch.linalg.slogdet(gram_of(x, y))

    return make


def curvlinops_eigenvalue(model: nn.Module, loss: PerSampleLoss) -> Callable[[Tensor, Tensor], object]:
    """The largest eigenvalue of the empirical Fisher matrix, by Lanczos, to three digits."""
    from curvlinops import EFLinearOperator
    from scipy.sparse.linalg import eigsh

    if loss is next_token:
        raise NotImplementedError("curvlinops takes a loss module of the logits and the targets")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def eigenvalue(x: Tensor, y: Tensor) -> object:
        fisher = EFLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
        return eigsh(fisher.to_scipy(), k=1, which="LA", tol=1e-3, return_eigenvectors=False)

    return eigenvalue


JOBS: dict[str, Callable[[nn.Module, PerSampleLoss], Callable[[Tensor, Tensor], object]]] = {
    **{f"{peer}, slogdet": slogdet_by(peer) for peer in ("vmap_grad", "backpack", "nngeometry")},
    "curvlinops, largest eigenvalue": curvlinops_eigenvalue,
}


def time_job(network: str, job: str, repetitions: int, clock: str, device: str) -> dict[str, Any]:
    """A peer's job in turn with plain passes."""
    model, x, y, loss = NETWORKS[network].make()
    x, y = x.to(device), y.to(device)
    reference = plain(model.to(device), loss)
    other = NETWORKS[network].make()[0].to(device)  # which the peer may put hooks on
    call = JOBS[job](other, loss)
    calls = {PLAIN: lambda: reference(x, y), job: lambda: call(x, y)}
    for each in calls.values():
        each()
    seconds = harness.interleaved(calls, repetitions, clock, device)
    return {"ratio": harness.ratios(seconds[job], seconds[PLAIN])}


def show(console: Console, network: str, result: dict[str, Any]) -> None:
    """Print one network's table."""
    table = Table(
        title=f"{network}: N' = {NETWORKS[network].samples}, in forward and backward passes of as many samples"
    )
    for heading in ("part", "median", "min – max"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    rows = [(name, ratio) for name, ratio in result.get("parts", {}).items()]
    rows += [(f"once: {name}", ratio) for name, ratio in result.get("once", {}).items()]
    for job, outcome in result["jobs"].items():
        rows.append((f"in place of ξ: {job}", outcome.get("ratio", outcome.get("error"))))
    for name, ratio in rows:
        if isinstance(ratio, str):
            table.add_row(name, f"fails: {ratio[:80]}")
        else:
            table.add_row(name, f"{ratio['median']:.2f}", f"{ratio['min']:.2f} – {ratio['max']:.2f}")
    console.print(table)
    if "all but robustness / ξ by itself" in result:
        ratio = result["all but robustness / ξ by itself"]
        console.print(f"  all but robustness / ξ: {ratio['median']:.2f} ({ratio['min']:.2f} – {ratio['max']:.2f})")
    if "error" in result:
        console.print(f"  no times: {result['error']}")


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=PAPERS)
    parser.add_argument("--trials", type=int, default=5, help="of measure, beside the first")
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=list(JOBS), help="of other libraries")
    parser.add_argument("--sharpness", type=float, default=1.0, help="factor on the last layer, in the trials")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = harness.parse(parser)
    console = Console(width=120)
    record: dict[str, Any] = {"environment": harness.environment(options, options.device), "networks": {}}
    for network in options.networks:
        if network in NEEDS_TRANSFORMERS and not importlib.util.find_spec("transformers"):
            console.print(f"{network}: skipped, transformers is not installed")
            continue
        limits, where = harness.limits(options), (options.clock, options.device)
        result = harness.in_own_process(trials_of, network, options.trials, options.sharpness, *where, **limits)
        result["samples"] = NETWORKS[network].samples
        result["jobs"] = {
            job: harness.in_own_process(time_job, network, job, options.repetitions, *where, **limits)
            for job in options.jobs
        }
        record["networks"][network] = result
        show(console, network, result)
        path = harness.write_json(options.output or "measure", record)
    if record["networks"]:
        console.print(f"written to {path}")


if __name__ == "__main__":
    main()
