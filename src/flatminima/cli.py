"""The command line: ``flatminima demo | train | measure | compare``. It parses, calls and prints; nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from flatminima.errors import FlatminimaError, FlatminimaWarning

try:
    import tyro
    from rich.console import Console
    from tyro.conf import AvoidSubcommands, OmitArgPrefixes, Positional, arg

    from flatminima.lab.specs import RECIPES, RegularizerSpec, RunSpec
except ModuleNotFoundError as missing:  # the library alone is installed
    sys.exit(f"flatminima: error: the command line needs {missing.name}: pip install 'flatminima[lab]'")

if TYPE_CHECKING:
    from torch import nn

    from flatminima.lab.data import ImageSet
    from flatminima.measures import Characterization

PROGRAM = "flatminima"
INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended."""


@dataclass(frozen=True)
class Output:
    """What a command prints."""

    json: bool = False
    """Print one JSON object on standard output and nothing else."""
    progress: bool = True
    """Show progress bars with the time left, on a terminal."""


@dataclass(frozen=True)
class Demo:
    """Both questions answered on handwritten digits, in minutes: writes OUT/report.html.

    Trains small networks with ever more randomly labelled images, with and without the regularizer, and sets γ̂ and its
    rivals beside the test error. Run it again and finished networks are not trained twice.

    Example: flatminima demo
    """

    out: Path = Path("demo")
    """Folder for the report, the summary and the runs."""
    workers: int | None = None
    """Networks trained at once (default: one per core)."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class Train:
    """Train one network into a run folder; the same command again goes on where it stopped.

    RECIPE is one of the paper's trainings, which the options below change. Giving any --regularizer option switches the
    Fisher trace regularizer on.

    Example: flatminima train resnet20 --data cifar10 --epochs 3
    """

    spec: Annotated[AvoidSubcommands[RunSpec], arg(name="")]
    root: Path = Path("runs")
    """Where run folders are kept."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, mps."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class Measuring:
    """How minima are measured."""

    subset_size: int = 100
    """Samples per subset, N'."""
    trials: int = 100
    """Number of subsets, T."""
    seed: int = 0
    """Draws the subsets; the same for every network."""
    batchnorm: Literal["eval"] | int = "eval"
    """BatchNorm by its running statistics (eval), or by those of chunks of this many samples."""
    logit_normalization: float | None = None
    """Divide logits by this times their norm before the loss (the authors' 0.04): for unequal training losses."""
    scale_invariant: bool = False
    """Weight gradients by the parameters' magnitudes, so that rescaling layers changes nothing."""
    max_standard_error: float | None = None
    """Stop as soon as the standard error of γ̂ is at most this."""
    robustness_samples: int | None = None
    """Samples per subset for the robustness, the costliest measure (none: all of them; 0: leave it out)."""
    on_singular: Literal["raise", "skip"] = "raise"
    """What to do with a subset whose gradients are linearly dependent (duplicates)."""
    memory_gib: float | None = None
    """Memory that may be used beside the network, in GiB (none: half of what is free)."""
    double: bool = False
    """Measure in float64."""


@dataclass(frozen=True)
class Foreign:
    """A network that is not ours."""

    model: str | None = None
    """package.module:factory, or one of our networks' names."""
    checkpoint: Path | None = None
    """Its weights: .safetensors, or .pt/.pth holding a state dict alone."""
    data: str | None = None
    """Its training data: digits, cifar10, cifar100, or a folder of parquet files."""


@dataclass(frozen=True)
class Measure:
    """Measure γ̂ and its rivals at trained minima, over subsets of their un-augmented training data.

    Takes run folders, or --model, --checkpoint and --data for a network that is not ours. A run folder keeps its
    measures, so that asking again costs nothing.

    Example: flatminima measure runs/resnet20-0123456789ab
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders."""
    foreign: OmitArgPrefixes[Foreign] = field(default_factory=Foreign)
    measuring: OmitArgPrefixes[Measuring] = field(default_factory=Measuring)
    device: str = "auto"
    """Where to measure: auto, cpu, cuda, mps."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class Compare:
    """Compare trained minima on the same subsets of the same data: paired differences, ranks.

    Takes run folders, each as FOLDER or NAME=FOLDER. They must have been trained on the same clean images, or be
    compared on the --data given.

    Example: flatminima compare plain=runs/resnet20-0123456789ab regularized=runs/resnet20-ba9876543210
    """

    runs: Positional[tuple[str, ...]]
    """Run folders, as FOLDER or NAME=FOLDER."""
    data: str | None = None
    """Compare on this training set instead of the runs' own."""
    measuring: OmitArgPrefixes[Measuring] = field(default_factory=Measuring)
    device: str = "auto"
    """Where to measure: auto, cpu, cuda, mps."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 bad input, 130 Ctrl-C)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default", FlatminimaWarning)
        warnings.showwarning = _show_warning
        try:
            status = _run(given)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt as interruption:
            _say(f"interrupted: {str(interruption) or 'the same command starts again'}")
            return INTERRUPTED
        except FlatminimaError as error:
            return _fail(error, 2)
        except BrokenPipeError:  # the reader of our output has gone, `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            return _fail(error, 1)


def _run(given: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "demo": _demo,
        "train": _train,
        "measure": _measure,
        "compare": _compare,
    }
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage(), end="")  # noqa: T201
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(version("flatminima"))  # noqa: T201
        return 0
    if given[0] not in commands:
        raise FlatminimaError(f"unknown command {given[0]!r}: choose from {', '.join(commands)} (flatminima --help)")
    return commands[given[0]](given[1:])


def _usage() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "Which minimum generalizes better, and how to train to it.", ""]
    for command in (Demo, Train, Measure, Compare):
        summary = (command.__doc__ or "").splitlines()[0]
        lines.append(f"  {command.__name__.lower():<9} {summary}")
    lines += ["", f"{PROGRAM} COMMAND --help lists a command's options; {PROGRAM} --version prints the version.", ""]
    return "\n".join(lines)


def _demo(given: list[str]) -> int:
    options = tyro.cli(Demo, prog=f"{PROGRAM} demo", args=given)
    from flatminima.lab import demo

    summary = demo.demo(options.out, workers=options.workers, progress=options.output.progress)
    if options.output.json:
        _print_json(summary)
    else:
        console = Console(width=max(Console().width, 120))
        console.print(demo.table(summary))
        console.print(f"\n{options.out / 'report.html'} shows it in pictures ({summary['seconds']:.0f} s).")
    return 0


def _train(given: list[str]) -> int:
    recipe, rest = _recipe(given)
    regularized = any(argument.startswith("--regularizer") for argument in rest)
    rest = [argument for argument in rest if argument != "--regularizer"]
    default = Train(dataclasses.replace(RECIPES[recipe], regularizer=RECIPES[recipe].regularizer or RegularizerSpec()))
    about = inspect.cleandoc(Train.__doc__ or "")
    description = f"{about}\n\nRecipes: {', '.join(RECIPES)}. The defaults below are those of {recipe!r}."
    options = tyro.cli(
        Train,
        prog=f"{PROGRAM} train [RECIPE]",
        description=description,
        default=default,
        args=rest,
    )
    spec = options.spec if regularized else dataclasses.replace(options.spec, regularizer=None)
    from flatminima.lab.results import RunFolder
    from flatminima.lab.training import train

    before = RunFolder.of(options.root, spec).status
    result = train(spec, options.root, progress=options.output.progress, accelerator=options.device)
    if options.output.json:
        _print_json({**dataclasses.asdict(result), "folder": str(result.folder)})
        return 0
    console = Console()
    said = {"finished": "was trained before", "unfinished": "resumed and finished"}.get(before, "finished")
    console.print(
        f"{spec.model} on {spec.data} {said}: {result.epochs} epochs, {result.seconds / result.epochs:.1f} s each"
    )
    console.print(f"  test error     {result.test_error:.2%}")
    console.print(f"  training loss  {result.train_loss:.4g} (accuracy {result.train_accuracy:.2%})")
    console.print(f"  run folder     {result.folder}", soft_wrap=True)
    console.print(f"next: {PROGRAM} measure {result.folder}", soft_wrap=True, highlight=False)
    return 0


def _recipe(given: list[str]) -> tuple[str, list[str]]:
    """The recipe named first; else that of the --model, of --data digits, or ResNet-20's."""
    if given and not given[0].startswith("-"):
        if given[0] not in RECIPES:
            raise FlatminimaError(f"unknown recipe {given[0]!r}: choose from {', '.join(RECIPES)}")
        return given[0], given[1:]
    values = dict(itertools.pairwise(given))
    if values.get("--data") == "digits":
        return "digits", given
    model = values.get("--model", "")
    return (model if model in RECIPES else "resnet20"), given


def _measure(given: list[str]) -> int:
    options = tyro.cli(Measure, prog=f"{PROGRAM} measure", args=given)
    foreign = options.foreign
    if bool(options.runs) == (foreign.model is not None):
        raise FlatminimaError("measure takes run folders, or --model with --data (and --checkpoint): give either")
    if options.runs:
        measured = {str(path): _measure_run(path, options) for path in options.runs}
    elif foreign.data is None:
        raise FlatminimaError("--model needs its training data too: give --data digits, cifar10, cifar100 or a folder")
    else:
        from flatminima.lab.data import load_data
        from flatminima.lab.loading import load_model

        train_set, _ = load_data(foreign.data)
        model = load_model(str(foreign.model), foreign.checkpoint, train_set)
        measured = {str(foreign.model): _characterize(model, train_set, options)}
    if options.output.json:
        bodies = {name: json.loads(c.to_json()) for name, c in measured.items()}
        _print_json(next(iter(bodies.values())) if len(bodies) == 1 else bodies)
        return 0
    console = Console()
    for name, characterization in measured.items():
        console.print(name, soft_wrap=True, highlight=False)
        console.print(characterization)
    return 0


def _measure_run(path: Path, options: Measure) -> Characterization:
    """The run's measures: read from its folder if they were asked for before, else taken and kept there."""
    from flatminima.lab.results import RunFolder, load_run
    from flatminima.measures import Characterization

    folder, asked = RunFolder(path), dataclasses.asdict(options.measuring)
    kept = json.loads(folder.read_measures() or "{}")
    if kept.get("asked") == asked:
        return Characterization.from_json(json.dumps(kept["characterization"]))
    _, model, clean, _ = load_run(path)
    characterization = _characterize(model, clean, options)
    folder.write_measures(json.dumps({"asked": asked, "characterization": json.loads(characterization.to_json())}))
    return characterization


def _compare(given: list[str]) -> int:
    options = tyro.cli(Compare, prog=f"{PROGRAM} compare", args=given)
    from flatminima.comparison import compare
    from flatminima.lab.data import load_data
    from flatminima.lab.results import load_run

    models: dict[str, nn.Module] = {}
    data = None if options.data is None else load_data(options.data)[0]
    for run in options.runs:
        name, _, path = run.rpartition("=")
        _, model, clean, _ = load_run(path)
        if data is None:
            data = clean
        elif options.data is None and not _same_images(data, clean):
            raise FlatminimaError(
                f"{path} was trained on other images than {options.runs[0]}: compare runs of one training set, or name "
                "the set to compare on with --data"
            )
        models[name or Path(path).name] = _placed(model, options.device, options.measuring.double)
    if len(models) < len(options.runs):
        raise FlatminimaError("two runs have the same name: give them as NAME=FOLDER")
    comparison = compare(models, _samples(data, options), **_measure_arguments(options))
    if options.output.json:
        print(comparison.to_json())  # noqa: T201
    else:
        Console(width=max(Console().width, 100)).print(comparison)
    return 0


def _characterize(model: nn.Module, data: ImageSet, options: Measure) -> Characterization:
    from flatminima.measures import measure

    model = _placed(model, options.device, options.measuring.double)
    return measure(model, _samples(data, options), **_measure_arguments(options))


def _measure_arguments(options: Measure | Compare) -> dict[str, Any]:
    chosen = dataclasses.asdict(options.measuring)
    del chosen["double"]
    gib = chosen.pop("memory_gib")
    budget = None if gib is None else int(gib * 2**30)
    return {**chosen, "memory_budget": budget, "progress": options.output.progress}


def _samples(data: Any, options: Measure | Compare) -> Any:
    """The data, in float64 where the network is."""
    if not options.measuring.double:
        return data
    inputs, labels = data.tensors()
    return inputs.double(), labels


def _placed(model: nn.Module, device: str, double: bool) -> nn.Module:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise FlatminimaError(f"--device {device} cannot be used here ({error}): choose another") from error
    return model.double() if double else model


def _same_images(first: ImageSet, second: ImageSet) -> bool:
    import torch

    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def _print_json(value: Any) -> None:
    print(json.dumps(value, default=str))  # noqa: T201


def _say(text: str) -> None:
    print(f"{PROGRAM}: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201


def _fail(error: Exception, status: int) -> int:
    if os.environ.get("FLATMINIMA_DEBUG"):
        raise error
    _say(f"error: {error}")
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, FlatminimaWarning):
        _say(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
