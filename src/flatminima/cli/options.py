"""What each command takes: options as frozen dataclasses, and how they are parsed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.cells import cell_len
from tyro.conf import AvoidSubcommands, FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from flatminima.cli.optional import OPTIONAL
from flatminima.cli.refusals import problems_handed_to, refusal
from flatminima.errors import FlatminimaError, require
from flatminima.lab.names import PresetName, Protocol
from flatminima.lab.reading import Reading
from flatminima.lab.runs import Measuring, RegularizerSpec, RunSpec, SharpnessAwareSpec

PROGRAM = "flatminima"
REGULARIZERS = ("regularizer", "sam")
"""Groups of options of `train` of which at most one is switched on, by giving any of them."""

Options = TypeVar("Options")
Flag = FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Output:
    """What a command prints."""

    json: Flag = False
    """Print one JSON object on standard output and nothing else; it names the files that were written as options do."""
    no_progress: Flag = False
    """Show no progress: on a terminal bars with the time left, for what takes longer than a second, else lines."""
    debug: Flag = False
    """Show where in the code an error comes from (as FLATMINIMA_DEBUG=1 does)."""


@dataclass(frozen=True)
class Demo:
    """Both questions answered on handwritten digits, in minutes: writes OUT/report.html.

    Trains small networks with ever more randomly labelled images, with and without the regularizer, and sets γ̂ and its
    rivals beside the test error. Run it again and finished networks are not trained twice.

    Example: flatminima demo
    """

    out: Annotated[Path, arg(aliases=("-o",))] = Path("demo")
    """Folder for the report, the summary and the runs."""
    workers: Annotated[int | None, arg(aliases=("-w",))] = None
    """Networks trained at once (None: one per core)."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)

    def __post_init__(self) -> None:
        _require_workers(self.workers)


def _require_workers(workers: int | None) -> None:
    require(workers is None or workers > 0, f"--workers must be positive, got {workers}")


@dataclass(frozen=True)
class RunOptions(RunSpec):
    """A run's description, with short names for what is changed most."""

    model: Annotated[str, arg(aliases=("-m",))] = RunSpec.model
    data: Annotated[str, arg(aliases=("-d",))] = RunSpec.data
    epochs: Annotated[int | None, arg(aliases=("-e",))] = RunSpec.epochs
    batch_size: Annotated[int, arg(aliases=("-b",))] = RunSpec.batch_size
    seed: Annotated[int, arg(aliases=("-s",))] = RunSpec.seed
    regularizer: RegularizerSpec = field(default_factory=RegularizerSpec)
    """The Fisher trace regularizer."""
    sam: SharpnessAwareSpec = field(default_factory=SharpnessAwareSpec)
    """Its rival, sharpness-aware minimization."""

    @classmethod
    def of(cls, recipe: RunSpec) -> RunOptions:
        """The options that stand for ``recipe``; those of both regularizers are always there to be seen and changed."""
        return cls(**{**fields_of(recipe), "regularizer": RegularizerSpec()})

    def spec(self, switched_on: Sequence[str]) -> RunSpec:
        """The run described, with one of ``regularizer`` and ``sam``, or neither."""
        if len(switched_on) > 1:
            raise FlatminimaError("--regularizer and --sam are rivals: give the options of one of them")
        fields = fields_of(self)
        found = {name: fields.pop(name) for name in REGULARIZERS}
        return RunSpec(**fields, regularizer=found[switched_on[0]] if switched_on else None)


@dataclass(frozen=True)
class Train:
    """Train one network into a run folder; the same command again goes on where it stopped.

    Under torchrun its processes share the run, each with a device of its own and an equal part of every mini-batch.

    --model takes a network of your own as package.module:factory: a function that returns a torch.nn.Module, given
    num_classes and in_channels if it has arguments of these names. It sees images of its data's size, normalized.

    RECIPE is one of the paper's trainings, and the options below change it. Without RECIPE it is that of the --model,
    digits for --data digits, or else resnet20. --regularizer, or any of its options, switches the regularizer on; and
    --sam, or any of its options, sharpness-aware minimization in its place.

    Example: flatminima train resnet20 --data cifar10 --epochs 3

    Example: flatminima train digits --model mypackage.nets:build

    Example: torchrun --nproc-per-node 2 -m flatminima train resnet20 --data cifar10
    """

    run: Annotated[AvoidSubcommands[RunOptions], arg(name="")]
    root: Annotated[Path, arg(aliases=("-r",))] = Path("runs")
    """Where run folders are kept."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train (auto: on a GPU if there is one)."""
    compile: Flag = False
    """Compile the network first: a minute or more of preparation, then faster; the same run up to rounding."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class MeasuringOptions(Measuring):
    """How minima are measured."""

    subset_size: Annotated[int, arg(aliases=("-n",))] = Measuring.subset_size
    trials: Annotated[int, arg(aliases=("-t",))] = Measuring.trials
    seed: Annotated[int, arg(aliases=("-s",))] = Measuring.seed
    scale_invariant: Flag = Measuring.scale_invariant
    per_parameter: Flag = Measuring.per_parameter
    double: Flag = Measuring.double

    def how(self) -> Measuring:
        """The same without names for the command line."""
        return Measuring(**fields_of(self))


_NORMALIZE = (
    "How the training normalized pixels of 0 to 1: none, data (every channel of these images to mean 0 and standard "
    "deviation 1), cifar10, cifar100, imagenet, or MEAN/STD such as 0.5/0.5 or 0.49,0.48,0.45/0.25,0.24,0.26 (None: as "
    "a run, a checkpoint of `train` or the network's own transforms say; else a guess that is said, by the training "
    "loss)."
)
SOURCES = (
    "digits, cifar10, cifar100, a folder of parquet files or of class folders with images, hf:NAME or hf:FOLDER, "
    "texts (.csv, .jsonl), arrays (.npz, .safetensors), or package.module:factory"
)
NETWORKS = (
    "package.module:factory (importable from the current directory too), timm:NAME, hf:NAME or hf:FOLDER, or the name "
    "of one of our networks"
)


@dataclass(frozen=True)
class ReadingOptions(Reading):
    """How data are read and prepared; what is left out is guessed, and said."""

    normalize: Annotated[str | None, arg(help=_NORMALIZE)] = None

    def plain(self) -> Reading:
        """The same without help for the command line."""
        return Reading(**fields_of(self))


@dataclass(frozen=True)
class Foreign:
    """A network that is not ours, and the data it was trained on."""

    model: Annotated[str | None, arg(aliases=("-m",), help=f"{NETWORKS}.")] = None
    checkpoint: Annotated[Path | None, arg(aliases=("-c",))] = None
    """Its weights: .safetensors, or .pt, .pth, .ckpt with a state dict (None: those that it comes with)."""
    data: Annotated[str | None, arg(aliases=("-d",), help=f"Its training data: {SOURCES}.")] = None


@dataclass(frozen=True)
class Measure:
    """Measure γ̂ and its rivals at trained minima, over subsets of their un-augmented training data.

    Takes run folders, or --model, --checkpoint and --data for a network that is not ours. A run folder keeps its
    measures, so that asking again costs nothing. docs/how-to/own-data.md has more on networks and data of your own.

    Example: flatminima measure runs/resnet20-0123456789ab

    Example: flatminima measure --model mypackage.nets:build --checkpoint weights.pt --data photos/train --resize 64
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")] = ()
    """Run folders."""
    foreign: OmitArgPrefixes[Foreign] = field(default_factory=Foreign)
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)
    measuring: OmitArgPrefixes[MeasuringOptions] = field(default_factory=MeasuringOptions)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure (auto: on a GPU if there is one)."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class Compare:
    """Compare trained minima on the same subsets of the same data: paired differences, ranks.

    Takes run folders, each as FOLDER or NAME=FOLDER. They must have been trained on the same clean images, or be
    compared on the --data given; with --model and --data, checkpoints of a network that is not ours stand beside them.
    Networks that come with their weights (hf:FOLDER, package.module:factory) stand where a folder may.

    Example: flatminima compare plain=runs/resnet20-0123456789ab regularized=runs/resnet20-ba9876543210

    Example: flatminima compare a.safetensors b.safetensors --model mypackage.nets:build --data cifar10

    Example: flatminima compare runs/resnet20-* --report page.html --plot parts.pdf --table table.tex
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """Run folders, checkpoints or networks, as FOLDER or NAME=FOLDER."""
    data: Annotated[
        str | None, arg(aliases=("-d",), help=f"Compare on this training set, not on the runs' own: {SOURCES}.")
    ] = None
    model: Annotated[str | None, arg(aliases=("-m",), help=f"What the checkpoints among RUNS are of: {NETWORKS}.")] = (
        None
    )
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)
    report: Annotated[Path | None, arg(aliases=("-o",))] = None
    """Also write a page with pictures: which minimum, by how much, is that sure, how much of it is fit."""
    plot: Path | None = None
    """Also draw γ̂'s parts for every minimum, into a file .pdf, .svg, .png and the like."""
    table: Path | None = None
    """Also write the table for a paper: .tex (booktabs) or .md."""
    measuring: OmitArgPrefixes[MeasuringOptions] = field(default_factory=MeasuringOptions)
    workers: Annotated[int, arg(aliases=("-w",))] = 1
    """Run folders measured at once, in processes that share the cores and the memory."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure (auto: on a GPU if there is one)."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)

    def __post_init__(self) -> None:
        _require_workers(self.workers)


@dataclass(frozen=True)
class Reproduce:
    """The paper's experiments from end to end: train, measure, and report beside the paper's numbers.

    Finished runs are kept, so that an interrupted reproduction goes on, and a failed run does not stop the others. The
    page in OUT/PRESET shows what is done so far.

    Example: flatminima reproduce scenario-1 --preset digits

    Example: flatminima reproduce all --preset small --data path/to/cifar --dry-run
    """

    experiments: Annotated[Positional[tuple[str, ...]], arg(metavar="EXPERIMENT")] = ()
    """scenario-1, scenario-2, scenario-3, table-1, table-2, search, or all."""
    preset: Annotated[PresetName, arg(aliases=("-p",))] = "digits"
    """How large: as in the paper; medium or small, on CIFAR-10; or in miniature, on handwritten digits."""
    protocol: Protocol = "paper"
    """When the scenarios' runs end: after the paper's epochs, or each once its training loss is down to the same."""
    out: Annotated[Path, arg(aliases=("-o",))] = Path("reproduction")
    """Folder for pages and runs."""
    data: Annotated[Path | None, arg(aliases=("-d",))] = None
    """Folder of CIFAR as parquet files, or of folders cifar10 and cifar100 with them (None: the Hugging Face hub)."""
    executor: Literal["local", "processes", "ray"] = "processes"
    """Where runs go: this process, worker processes of one thread each, or a Ray cluster (that of RAY_ADDRESS)."""
    workers: Annotated[int | None, arg(aliases=("-w",))] = None
    """Worker processes (None: one per core). Of a Ray cluster: runs at once, as far as the time left is estimated."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the paper's five (0 to 4)."""
    measures: tuple[str, ...] = ()
    """Measures beside the preset's: names, or groups: free, cheap, weights, all; or your own, as
    package.module:function."""
    trials: Annotated[int | None, arg(aliases=("-t",))] = None
    """Search by this many trials of Optuna for every network, hopeless ones pruned (None: over the whole grid)."""
    records: Annotated[Path | None, arg(aliases=("-r",))] = None
    """Folder of experiments' JSON, such as one of results/: the runs it holds are finished, whatever machine they were
    made on."""
    dry_run: Flag = False
    """Only say what would run, and for how long."""
    no_runs: Flag = False
    """Run nothing: write page and tables of what is finished, and say what is missing."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)

    def __post_init__(self) -> None:
        _require_workers(self.workers)
        require(
            self.executor != "local" or self.workers in (None, 1),
            f"--executor local is this process alone, got --workers {self.workers}: leave out one of them",
        )
        require(self.seeds != (), "--seeds needs at least one number")
        require(not (self.dry_run and self.no_runs), "--dry-run writes nothing, --no-runs writes tables: give either")


TYPED: ContextVar[tuple[str, ...]] = ContextVar("options", default=())
"""The options of the present command as they are typed."""


def parse(command: type[Options], given: list[str], *, prog: str, **parsing: Any) -> Any:
    """The options given; what is wrong with them as a :class:`FlatminimaError` of one line."""
    name = prog.split()[0]
    TYPED.set(tuple(option_names(parsing.get("default") or command())))

    def refuse(problem: object) -> None:
        said = refusal(problem, TYPED.get())
        if said:
            raise FlatminimaError(f"{said} ({PROGRAM} {name} --help explains)")

    shown = _Help()
    try:
        with OPTIONAL, problems_handed_to(refuse), contextlib.redirect_stdout(shown):
            return tyro.cli(command, prog=f"{PROGRAM} {prog}", args=given, **parsing)
    except SystemExit as leaving:
        is_help = {"-h", "--help"} & set(given)  # the rest is for programs: completion for shells
        print(shown.wrapped() if is_help else shown.getvalue(), end="")  # noqa: T201
        raise Shown(leaving.code) from None


class _Help(io.StringIO):
    """What tyro prints, drawn as for the standard output there is."""

    def __init__(self) -> None:
        super().__init__()
        self._output = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return (self._output.encoding or "ascii").lower()  # tyro knows it by this name alone

    def isatty(self) -> bool:
        return self._output.isatty()

    def wrapped(self) -> str:
        """The text, its lines outside of boxes as wide as those within."""
        width = shutil.get_terminal_size().columns
        text = self.getvalue().replace("``", "")
        return "".join(f"{_filled(line, width)}\n" for line in text.splitlines())


def _filled(line: str, width: int) -> str:
    shown = re.sub(r"\x1b\[[0-9;]*m", "", line)  # without colours
    if shown[:1] in _EDGES:
        start, last = line[: line.rindex(shown[-1])], line[line.rindex(shown[-1]) :]
        return f"{start}{' ' * (len(shown) - cell_len(shown))}{last}"  # the hat of γ̂ takes no column
    return line if len(shown) <= width else textwrap.fill(line, width, break_on_hyphens=False)


_EDGES = ("╭", "│", "╰")
"""What the lines of boxes begin with."""


class Shown(Exception):  # noqa: N818
    """The help was shown, or what is wrong: there is nothing more to do."""

    def __init__(self, code: str | int | None) -> None:
        super().__init__()
        self.status = code if isinstance(code, int) else int(code is not None)


def option_names(options: Any) -> list[str]:
    """A command's options as they are typed: of its groups' fields without the group's name, of theirs with it."""
    names = []
    for name, value in fields_of(options).items():
        group = fields_of(value) if dataclasses.is_dataclass(value) else {name: value}
        for first, inner in group.items():
            names.append(first)
            names += [f"{first}.{second}" for second in (fields_of(inner) if dataclasses.is_dataclass(inner) else ())]
    return [f"--{name.replace('_', '-')}" for name in names]


def options_meant(text: str, names: Sequence[str]) -> list[str]:
    """The options that a message calls by their names in Python, as ``batch_size``: it knows no command line."""
    words = set(re.findall(r"[A-Za-z][\w.]*\w", re.sub(r"\bRunSpec\.", "", text)))
    plain = {word for word in words if "_" in word or "." in word or word in _UNMISTAKABLE}
    found = {name: name.removeprefix("--").replace("-", "_") for name in names if name not in text}
    return [name for name, word in found.items() if word in plain or word.rpartition(".")[2] in plain]


_UNMISTAKABLE = ("lr", "normalize", "resize")
"""Options without an underscore that are no words of prose."""


def fields_of(value: Any) -> dict[str, Any]:
    """A dataclass's fields as they are (``dataclasses.asdict`` would take nested ones apart)."""
    return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
