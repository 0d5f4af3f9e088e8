"""Tables from the committed records; needs no Sphinx."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flatminima.lab.experiments import (
    PLAIN,
    REGULARIZED,
    SHORT_NAMES,
    Difference,
    RankCorrelation,
    Summary,
    paired_difference,
    read_summaries,
)
from flatminima.tables import Table, rounded

ROOT = Path(__file__).parents[2]
RESULTS, BENCHMARKS = ROOT / "results", ROOT / "benchmarks" / "results"
MIB = 2**20
TOLERANCE = 1e-3
"""Results further off than this, relative to the gradients' norms, are said to be."""


def summaries_of(folder: str) -> list[Summary]:
    """All experiments of a folder of results, in the order of their files' names."""
    files = sorted((RESULTS / folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no records in results/{folder}")
    return [summary for file in files for summary in read_summaries(file)]


def rankings_table(folders: Sequence[str]) -> Table:
    """Kendall's τ with the test error over single minima: a measure a row, an experiment a column."""
    found = [
        (f"{folder}: {summary.title}", summary.correlations, len(summary.records))
        for folder in folders
        for summary in summaries_of(folder)
        if summary.correlations
    ]
    measures = list(dict.fromkeys(name for _, correlations, _ in found for name in correlations))
    rows = [
        (SHORT_NAMES.get(name, name), *(with_interval(correlations.get(name)) for _, correlations, _ in found))
        for name in measures
    ]
    header = ("measure", *(f"{title} ({count} minima)" for title, _, count in found))
    return Table("Kendall's τ with the test error, over single minima; in brackets 95 % intervals", header, tuple(rows))


def with_interval(found: RankCorrelation | None) -> str:
    """τ with its interval; a dash where there is none."""
    if found is None or not found.defined:
        return "–"
    return f"{found.tau:+.2f} [{found.low:.2f}, {found.high:.2f}]"


def cost_of_gram(file: str) -> Table:
    """Time of one ξ beside those of other libraries, and the least that its arithmetic takes."""
    networks = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["networks"]
    methods = [method for method in _methods_of(networks) if method != "forward-backward"]
    rows = tuple(
        (
            name,
            str(network["samples"]),
            *(_time_and_error(network["methods"].get(method)) for method in methods),
            _floor(network["floor"]),
        )
        for name, network in networks.items()
    )
    caption = "Time as a ratio to a forward and backward pass: the median, the smallest and largest"
    return Table(caption, ("network", "samples", *methods, "floor"), rows)


def memory_of_gram(file: str) -> Table:
    """Peak memory of one ξ beside those of other libraries."""
    networks = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["networks"]
    methods = _methods_of(networks)
    rows = tuple(
        (name, str(network["samples"]), *(_memory(network["methods"].get(method)) for method in methods))
        for name, network in networks.items()
    )
    return Table("Peak memory in MiB, beside model and data", ("network", "samples", *methods), rows)


def _methods_of(networks: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for network in networks.values() for name in network["methods"]))


def _time_and_error(found: Mapping[str, Any] | None) -> str:
    if found is None or "ratio" not in found:
        return "–"
    wrong = f", off by {found['relative_error']:.0e}" if found.get("relative_error", 0.0) > TOLERANCE else ""
    return f"{_range(found['ratio'])}{wrong}"


def _memory(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None or "ratio" not in found else f"{found['peak_bytes'] / MIB:,.0f}"


def _floor(found: Mapping[str, float]) -> str:
    """With rows that take as long as the plain pass's weight gradients, and as their arithmetic alone."""
    both = sorted(found[name] for name in found if name.startswith("floor"))
    return f"{both[0]:.2f} to {both[-1]:.2f}"


def shares_of_gram() -> Table:
    """Where the time of one ξ goes."""
    networks = json.loads((BENCHMARKS / "shares.json").read_text(encoding="utf-8"))["networks"]
    kinds = list(next(iter(networks.values())))
    rows = tuple((name, *(_percent(found[kind]) for kind in kinds)) for name, found in networks.items())
    return Table("Shares of the time of ξ in %: the median, the smallest and largest", ("network", *kinds), rows)


def _percent(share: Mapping[str, float]) -> str:
    return f"{100 * share['median']:.0f} ({100 * share['min']:.0f} to {100 * share['max']:.0f})"


def _time_and_memory(found: Mapping[str, Any] | None) -> str:
    if found is None or "ratio" not in found:
        return "–"
    return f"{_range(found['ratio'])}, {found['peak_bytes'] / MIB:,.0f} MiB"


def cost_of_steps() -> Table:
    """Time and peak memory of one training step."""
    caption = "Time as a ratio to a plain step (the median, the smallest and largest), and peak memory"
    return _table_of_steps(caption, "regularizer.json", _time_and_memory)


def cost_of_small_steps() -> Table:
    """Time of one training step where the networks are so small that most of it is not arithmetic."""
    caption = "Time as a ratio to a plain step: the median, and the smallest and largest"
    return _table_of_steps(caption, "regularizer-small.json", _time_and_range)


def _table_of_steps(caption: str, file: str, cell: Callable[[Mapping[str, Any] | None], str]) -> Table:
    networks = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["networks"]
    steps = list(dict.fromkeys(step for found in networks.values() for step in found))
    rows = tuple((step, *(cell(found.get(step)) for found in networks.values())) for step in steps)
    return Table(caption, ("step", *networks), rows)


def _time_and_range(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None or "ratio" not in found else _range(found["ratio"])


def _range(ratio: Mapping[str, float]) -> str:
    return "{median:.2f} ({min:.2f} to {max:.2f})".format_map(ratio)


def gains_of_compare() -> Table:
    """How much sooner a comparison ends where the cores do not share one model's work."""
    networks = json.loads((BENCHMARKS / "compare.json").read_text(encoding="utf-8"))["networks"]
    ways = list(dict.fromkeys(way for found in networks.values() for way in found))
    rows = tuple((way, *(_time_and_range(found.get(way)) for found in networks.values())) for way in ways)
    caption = "How many times sooner than the first: the median, and the smallest and largest"
    return Table(caption, ("four models on two cores", *networks), rows)


def cost_where_memory_is_kept() -> Table:
    """Training and measuring where freed memory is kept for the next tensors, beside the heap as it is."""
    networks = json.loads((BENCHMARKS / "heap.json").read_text(encoding="utf-8"))["networks"]
    rows = tuple(
        (network, task, _time_and_range(found.get("kept")), *_faults_and_memory(found))
        for network, tasks in networks.items()
        for task, found in tasks.items()
    )
    header = ("network", "task", "time", "page faults", "as it is", "peak memory (MiB)", "as it is")
    return Table("Time as a ratio to the heap as it is: the median, the smallest and largest", header, rows)


def _faults_and_memory(found: Mapping[str, Any]) -> tuple[str, ...]:
    if "error" in found:
        return ("–",) * 4
    both = found["kept"], found["as it is"]
    return (
        *(f"{one['faults']['median']:,.0f}" for one in both),
        *(f"{one['peak_bytes'] / MIB:,.0f}" for one in both),
    )


def cost_of_measure(file: str) -> Table:
    """A trial of ``measure`` by part, what is done once, and other libraries' jobs in place of ξ."""
    networks = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["networks"]
    cells = {name: _parts_of_measure(found) for name, found in networks.items()}
    parts = list(dict.fromkeys(part for found in cells.values() for part in found))
    rows = tuple((part, *(found.get(part, "–") for found in cells.values())) for part in parts)
    caption = "As a ratio to a forward and backward pass of as many samples: the median, and the smallest and largest"
    header = ("part", *(f"{name}, N' = {found['samples']}" for name, found in networks.items()))
    return Table("measure, by part", header, rows, caption)


def _parts_of_measure(found: Mapping[str, Any]) -> dict[str, str]:
    sharp = {"mean of the largest p": f"{p:.2f}"} if (p := found.get("largest probability")) is not None else {}
    once = {f"once: {name}": _range(ratio) for name, ratio in found["once"].items()}
    jobs = {f"in place of ξ: {name}": _time_and_range(outcome) for name, outcome in found["jobs"].items()}
    ratio = {"all but robustness, in ξ": _range(found["all but robustness / ξ by itself"])}
    return sharp | {name: _range(ratio) for name, ratio in found["parts"].items()} | ratio | once | jobs


def cost_of_robustness(file: str) -> Table:
    """The input Jacobian's spectral norm beside the ways others take to it, in ours."""
    results = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["results"]
    methods = list(results[0]["methods"])
    rows = tuple(
        (
            f"{found['network']}, {found['classes']} classes, logits × {found['sharpness']:g}",
            _range(found["methods"][methods[0]]["passes"]),
            *(_time_and_range(found["methods"][method]) for method in methods[1:]),
        )
        for found in results
    )
    caption = (
        "Ours in units of one forward pass and one backward pass to the input, the others as ratios to ours: "
        "the median, and the smallest and largest"
    )
    return Table(f"Robustness of {results[0]['samples']} samples", ("", *methods), rows, caption)


def cosines() -> Table:
    """How well the finite difference points where its limit does, at the paper's α."""
    record = json.loads((BENCHMARKS / "finite_differences.json").read_text(encoding="utf-8"))
    rows = tuple(
        (f"{activation}, {stage}", *(f"{_at(points)['cosine']:+.3f}" for points in precisions.values()))
        for stage, activations in record["stages"].items()
        for activation, precisions in activations.items()
    )
    precisions = next(iter(next(iter(record["stages"].values())).values()))
    return Table("Cosine of ∇R with its limit αHg, at α = 1e-4", ("network", *precisions), rows)


def _at(points: Sequence[Mapping[str, float]], alpha: float = 1e-4) -> Mapping[str, float]:
    return next(point for point in points if point["alpha"] == alpha)


def starts(file: str) -> Table:
    """Test errors at suggestions of several strengths, beside plain training and the best β of a grid, if there is one.

    On the seeds that plain training and all suggestions have; of the grid, arms that have these, too. Of a single seed
    nothing is judged.
    """
    record = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))
    rows, judged, counts = [], {}, []
    for case, arms in record["runs"].items():
        ratios = sorted((arm for arm in arms if arm.startswith("ratio ")), key=_number_of)
        common = sorted(set.intersection(*(set(arms[arm]) for arm in ("plain", *ratios))), key=int)
        if not common:
            continue
        counts.append(len(common))
        errors = {
            arm: [100 * runs[seed]["test_error"] for seed in common]
            for arm, runs in arms.items()
            if set(common) <= set(runs)
        }
        grid = [arm for arm in errors if arm.startswith("beta ")]
        best = min(grid, key=lambda beta: statistics.fmean(errors[beta]), default=None)
        plain = _mean(errors["plain"])
        of_grid = "–" if best is None else f"{_mean(errors[best])} (β {_number_of(best):g})"
        for ratio in ratios:
            chosen = [arms[ratio][seed]["settings"]["beta"] for seed in common]
            gained = _differences(errors[ratio], errors["plain"])
            behind = None if best is None else _differences(errors[ratio], errors[best])
            if len(common) > 1:
                judged.setdefault(ratio, []).append((_with_error(gained), behind and _with_error(behind)))
            betas = f"{min(chosen):g}" if len(set(chosen)) == 1 else f"{min(chosen):g} to {max(chosen):g}"
            at = f"{_number_of(ratio):g}: {_mean(errors[ratio])} (β {betas})"
            from_best = "–" if behind is None else _mean(behind, signed=True)
            rows.append((case, plain, of_grid, at, from_best, _mean(gained, signed=True)))
    header = ("network", "plain", "best of the grid", "suggested", "suggested − best", "suggested − plain")
    told = "; ".join(_judgement(_number_of(ratio), judged[ratio]) for ratio in sorted(judged, key=_number_of))
    seeds = f"{max(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    caption = f"Means over {seeds} seeds, the differences paired, with standard errors. Suggestions for {told}"
    return Table("Test error (%)", header, tuple(rows), caption)


def stops(file: str) -> Table:
    """Test errors of plain training at its end and stopped early, beside those of the regularizer, if run, at its end.

    Stopped early is after the epoch with the least error on the held-out images, the first of several; the best epoch
    is chosen on the test set, and no way of stopping comes below it.
    """
    rows = []
    for case, arms in json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["runs"].items():
        plain, end = arms[PLAIN], _test_errors(arms.get(REGULARIZED, {}), _last)
        ways = {"end": _last, "stopped": _least("validation_error"), "best": _least("test_error")}
        errors = {name: _test_errors(plain, epoch) for name, epoch in ways.items()}
        rows.append(
            (
                case,
                *(_mean(list(values.values())) if values else "–" for values in (*errors.values(), end)),
                _with_limits(paired_difference(errors["stopped"], errors["end"])),
                _with_limits(paired_difference(end, errors["stopped"])),
                _with_limits(paired_difference(end, errors["best"])),
            )
        )
    header = (
        "network, data",
        "plain",
        "stopped early",
        "best epoch",
        "+reg",
        "stopped early − plain",
        "+reg − stopped early",
        "+reg − best epoch",
    )
    caption = "Means over seeds with standard errors, and differences paired by seed with 95 % intervals (Student's)"
    return Table("Test error (%)", header, tuple(rows), caption)


Curves = Mapping[str, Sequence[float]]


def _test_errors(runs: Mapping[str, Curves], epoch: Callable[[Curves], int]) -> dict[str, float]:
    """In percent by seed, after the epoch that is chosen of each run."""
    return {seed: 100 * curves["test_error"][epoch(curves)] for seed, curves in runs.items()}


def _last(curves: Curves) -> int:
    return len(curves["test_error"]) - 1


def _least(error: str) -> Callable[[Curves], int]:
    return lambda curves: curves[error].index(min(curves[error]))


def _with_limits(found: Difference | None) -> str:
    """As the records have it."""
    return "–" if found is None else f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _number_of(arm: str) -> float:
    """The strength, or β, in an arm's name."""
    return float(arm.split()[1])


MeanAndError = tuple[float, float]


def _judgement(ratio: float, found: Sequence[tuple[MeanAndError, MeanAndError | None]]) -> str:
    better = sum(mean < -2 * error for (mean, error), _ in found)
    worse = sum(mean > 2 * error for (mean, error), _ in found)
    behind = [mean <= 2 * error for mean, error in (best for _, best in found if best is not None)]
    near = f", no more than two behind the grid's best on {sum(behind)} of {len(behind)}" if behind else ""
    return (
        f"penalty_to_gradient={ratio:g} are more than two of these better than plain training on {better} of "
        f"{len(found)}, more than two worse on {worse}{near}"
    )


def _differences(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, others, strict=True)]


def _mean(values: Sequence[float], *, signed: bool = False) -> str:
    """With its standard error where there are several."""
    if len(values) > 1:
        return rounded(*_with_error(values), signed=signed)
    return f"{values[0]:{'+' if signed else ''}.1f}"


def _with_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def origin_of(file: str) -> str:
    """What made a benchmark's record, and on what."""
    environment = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["environment"]
    return f"By `{environment['command']}`, on {environment['cpu']} with torch {environment['torch']}."


MEASURE_RECORDS = (
    "measure",
    *(f"measure-{name}" for name in ("wrn28-2", "large", "imagenet", "sharp", "curvlinops")),
)
STARTS = ("suggest", "suggest-cifar", "suggest-large")

BENCHMARK_TABLES = {
    **{name: (f"{name}.json", partial(cost_of_gram, f"{name}.json")) for name in ("gram", "gram-avx2")},
    "gram-memory": ("gram.json", partial(memory_of_gram, "gram.json")),
    **{name: (f"{name}.json", partial(cost_of_measure, f"{name}.json")) for name in MEASURE_RECORDS},
    "shares": ("shares.json", shares_of_gram),
    **{
        name: (f"{name}.json", partial(cost_of_robustness, f"{name}.json"))
        for name in ("robustness", "robustness-1000")
    },
    "compare": ("compare.json", gains_of_compare),
    "heap": ("heap.json", cost_where_memory_is_kept),
    "regularizer": ("regularizer.json", cost_of_steps),
    "regularizer-small": ("regularizer-small.json", cost_of_small_steps),
    "finite-differences": ("finite_differences.json", cosines),
    **{name: (f"{name}.json", partial(starts, f"{name}.json")) for name in STARTS},
    "stopping": ("early_stopping.json", partial(stops, "early_stopping.json")),
    "stopping-cifar": ("early_stopping-cifar.json", partial(stops, "early_stopping-cifar.json")),
}
"""By name: the record and what makes its table."""
