"""The command line: ``flatminima demo | train | measure | compare | reproduce``: parse, call, print."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

from flatminima.errors import FlatminimaError, FlatminimaWarning, NonFiniteError, RankDeficientError
from flatminima.lab.errors import TrainingInterrupted
from flatminima.parallel.processes import Processes

try:
    import tyro
    from rich.console import Console, Group, RenderableType
    from rich.text import Text
    from tyro.conf import AvoidSubcommands, FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

    from flatminima.lab.runs.measuring import Measuring
    from flatminima.lab.runs.spec import RECIPES, RegularizerSpec, RunSpec, SharpnessAwareSpec
except ModuleNotFoundError as missing:  # the library alone is installed
    sys.exit(f"flatminima: error: the command line needs {missing.name}: pip install 'flatminima[lab]'")

PROGRAM = "flatminima"
INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended."""
NARROWEST_TABLE = 120
"""Columns of a table that goes to a file or a pipe; on a terminal it is as wide as that."""
REGULARIZERS = ("regularizer", "sam")
"""Groups of options of `train` of which at most one is switched on, by giving any of them."""

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")

Options = TypeVar("Options")
Flag = FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Output:
    """What a command prints."""

    json: Flag = False
    """Print one JSON object on standard output and nothing else."""
    no_progress: Flag = False
    """Show no progress bars; otherwise they appear on a terminal, for what takes longer than two seconds."""
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
        return cls(**{**_fields(recipe), "regularizer": RegularizerSpec()})

    def spec(self, switched_on: Sequence[str]) -> RunSpec:
        """The run described, with one of ``regularizer`` and ``sam``, or neither."""
        if len(switched_on) > 1:
            raise FlatminimaError("--regularizer and --sam are rivals: give the options of one of them")
        fields = _fields(self)
        found = {name: fields.pop(name) for name in REGULARIZERS}
        return RunSpec(**fields, regularizer=found[switched_on[0]] if switched_on else None)


@dataclass(frozen=True)
class Train:
    """Train one network into a run folder; the same command again goes on where it stopped.

    Under torchrun its processes share the run, each with a device of its own and an equal part of every mini-batch.

    RECIPE is one of the paper's trainings, and the options below change it. Without RECIPE it is that of the --model,
    digits for --data digits, or else resnet20. --regularizer, or any of its options, switches the regularizer on; and
    --sam, or any of its options, sharpness-aware minimization in its place.

    Example: flatminima train resnet20 --data cifar10 --epochs 3

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
    double: Flag = Measuring.double

    def how(self) -> Measuring:
        """The same without names for the command line."""
        return Measuring(**_fields(self))


@dataclass(frozen=True)
class Foreign:
    """A network that is not ours, and the data it was trained on."""

    model: Annotated[str | None, arg(aliases=("-m",))] = None
    """package.module:factory (importable from the current directory too), or the name of one of our networks."""
    checkpoint: Annotated[Path | None, arg(aliases=("-c",))] = None
    """Its weights: .safetensors, or .pt/.pth holding a state dict alone (None: those that the factory gives it)."""
    data: Annotated[str | None, arg(aliases=("-d",))] = None
    """Its training data: digits, cifar10, cifar100, or a folder of parquet files."""


@dataclass(frozen=True)
class Measure:
    """Measure γ̂ and its rivals at trained minima, over subsets of their un-augmented training data.

    Takes run folders, or --model, --checkpoint and --data for a network that is not ours. A run folder keeps its
    measures, so that asking again costs nothing.

    Example: flatminima measure runs/resnet20-0123456789ab

    Example: flatminima measure --model mypackage.nets:build --checkpoint weights.safetensors --data cifar10
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")] = ()
    """Run folders."""
    foreign: OmitArgPrefixes[Foreign] = field(default_factory=Foreign)
    measuring: OmitArgPrefixes[MeasuringOptions] = field(default_factory=MeasuringOptions)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure (auto: on a GPU if there is one)."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class Compare:
    """Compare trained minima on the same subsets of the same data: paired differences, ranks.

    Takes run folders, each as FOLDER or NAME=FOLDER. They must have been trained on the same clean images, or be
    compared on the --data given; with --model and --data, checkpoints of a network that is not ours stand beside them.

    Example: flatminima compare plain=runs/resnet20-0123456789ab regularized=runs/resnet20-ba9876543210

    Example: flatminima compare a.safetensors b.safetensors --model mypackage.nets:build --data cifar10
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """Run folders, as FOLDER or NAME=FOLDER."""
    data: Annotated[str | None, arg(aliases=("-d",))] = None
    """Compare on this training set (digits, cifar10, cifar100, or a folder of parquet files), not on the runs' own."""
    model: Annotated[str | None, arg(aliases=("-m",))] = None
    """What the checkpoints among RUNS are of: package.module:factory, or the name of one of our networks."""
    measuring: OmitArgPrefixes[MeasuringOptions] = field(default_factory=MeasuringOptions)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure (auto: on a GPU if there is one)."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


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
    preset: Annotated[Literal["paper", "small", "digits"], arg(aliases=("-p",))] = "digits"
    """How large: as in the paper; in small, on CIFAR-10; or in miniature, on handwritten digits."""
    out: Annotated[Path, arg(aliases=("-o",))] = Path("reproduction")
    """Folder for pages and runs."""
    data: Annotated[Path | None, arg(aliases=("-d",))] = None
    """Folder of CIFAR as parquet files, or of folders cifar10 and cifar100 with them (None: the Hugging Face hub)."""
    executor: Literal["local", "processes", "ray"] = "processes"
    """Where runs go: this process, worker processes of one thread each, or a Ray cluster (that of RAY_ADDRESS)."""
    workers: Annotated[int | None, arg(aliases=("-w",))] = None
    """Worker processes (None: one per core)."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the paper's five (0 to 4)."""
    trials: Annotated[int | None, arg(aliases=("-t",))] = None
    """Search by this many trials of Optuna for every network, hopeless ones pruned (None: over the whole grid)."""
    dry_run: Flag = False
    """Only say what would run, and for how long."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class Report:
    """A command's outcome, for programs and for people."""

    json: Any
    text: RenderableType
    status: int = 0
    """The exit status: 1 where a part of the work failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 bad input, 130 Ctrl-C)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or bool(os.environ.get("FLATMINIMA_DEBUG"))
    with warnings.catch_warnings():
        warnings.simplefilter("always", FlatminimaWarning)
        warnings.showwarning = _show_warning
        try:
            status = _run(given)
            sys.stdout.flush()
            return status
        except SystemExit as exit_:  # --help of a command
            return int(exit_.code or 0)
        except TrainingInterrupted as interruption:
            return _fail(f"interrupted: {interruption}", INTERRUPTED, False)
        except KeyboardInterrupt:
            return _fail("interrupted: the same command starts again", INTERRUPTED, False)
        except BrokenPipeError:  # the reader of our output has gone, `| head`
            with contextlib.suppress(OSError, ValueError):  # so that the interpreter's own flush does not fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except RankDeficientError as error:
            return _fail(f"error: {error} (options: --on-singular skip, --double, --subset-size)", 2, debug)
        except NonFiniteError as error:  # one process alone may have met it
            return _fail(f"error: {error}", 2, debug, by_any=True)
        except (FlatminimaError, FileNotFoundError) as error:
            return _fail(f"error: {error}", 2, debug)
        except ModuleNotFoundError as error:
            return _fail(f"error: the command line needs {error.name}: pip install 'flatminima[lab]'", 1, debug)
        except OSError as error:
            return _fail(f"error: {error}", 1, debug, by_any=True)
        except Exception as error:
            return _fail(f"error: {type(error).__name__}: {error} (--debug shows where)", 1, debug, by_any=True)


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage(), end="")  # noqa: T201
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(PROGRAM, version(PROGRAM))  # noqa: T201
        return 0
    if given[0] not in COMMANDS:
        hint = _did_you_mean(given[0], list(COMMANDS))
        raise FlatminimaError(f"unknown command {given[0]!r}{hint}: choose from {', '.join(COMMANDS)}")
    processes = Processes.launched()
    if processes.size > 1 and given[0] != "train":
        raise FlatminimaError(f"only `train` can be shared by several processes: start `{given[0]}` without torchrun")
    as_json, report = COMMANDS[given[0]](given[1:])
    if processes.rank > 0:
        return report.status
    if as_json:
        print(json.dumps(report.json, default=str, allow_nan=False))  # noqa: T201
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=NARROWEST_TABLE)
        console.print(report.text, soft_wrap=isinstance(report.text, Text))
    return report.status


def _usage() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "Which minimum generalizes better, and how to train to it.", ""]
    for command in (Demo, Train, Measure, Compare, Reproduce):
        summary = (command.__doc__ or "").splitlines()[0]
        lines.append(f"  {command.__name__.lower():<10} {summary}")
    lines += [
        "",
        f"Begin with: {PROGRAM} demo",
        f"{PROGRAM} COMMAND --help explains a command; {PROGRAM} --version prints the version.",
        "",
    ]
    return "\n".join(lines)


def _demo(given: list[str]) -> tuple[bool, Report]:
    options = _parse(Demo, given, prog="demo")
    with _standard_output_kept_clean():
        from flatminima.lab import demo

        summary = demo.demo(options.out, workers=options.workers, progress=not options.output.no_progress)
        page = Text(f"\n{options.out / 'report.html'} shows it in pictures ({summary['seconds']:.0f} s).")
        return options.output.json, Report(summary, Group(demo.table(summary), page))


def _train(given: list[str]) -> tuple[bool, Report]:
    recipe, rest = _recipe(given)
    about = inspect.cleandoc(Train.__doc__ or "")
    options = _parse(
        Train,
        [argument for argument in rest if argument not in [f"--{name}" for name in REGULARIZERS]],
        prog="train [RECIPE]",
        description=f"{about}\n\nRecipes: {', '.join(RECIPES)}. The defaults below are those of {recipe!r}.",
        default=Train(RunOptions.of(RECIPES[recipe])),
    )
    spec = options.run.spec(
        [name for name in REGULARIZERS if any(re.match(rf"--{name}(\.|$)", argument) for argument in rest)]
    )
    with _standard_output_kept_clean():
        from flatminima.lab.networks.foreign import resolve_device
        from flatminima.lab.runs.folder import RunFolder
        from flatminima.lab.runs.training import train

        folder = RunFolder.of(options.root, spec)
        before = folder.status
        if before == "unfinished":
            _say(f"going on with the unfinished run in {folder.path}")
        accelerator = "auto" if options.device == "auto" else resolve_device(options.device).type
        result = train(
            spec,
            options.root,
            progress=not options.output.no_progress,
            accelerator=accelerator,
            compile=options.compile,
        )
    happened = {"finished": "was trained before, nothing to do", "unfinished": "resumed and finished"}
    seconds = result.seconds / result.epochs
    lines = [
        f"{spec.model} on {spec.data}: {happened.get(before, 'finished')}",
        f"  run folder     {result.folder}",
        f"  test error     {result.test_error:.2%}",
        *([] if result.validation_error is None else [f"  validation     {result.validation_error:.2%} error"]),
        f"  training loss  {result.train_loss:.4g} (accuracy {result.train_accuracy:.2%})",
        f"  time           {seconds:.3g} s per epoch, {result.epochs} epochs",
        f"next: {PROGRAM} measure {shlex.quote(str(result.folder))}",
    ]
    values = {**dataclasses.asdict(result), "seconds_per_epoch": seconds, "spec": dataclasses.asdict(spec)}
    return options.output.json, Report(values, Text("\n".join(lines)))


@dataclass(frozen=True)
class _Subject:
    """What decides the recipe where none is named."""

    model: Annotated[str | None, arg(aliases=("-m",))] = None
    data: Annotated[str | None, arg(aliases=("-d",))] = None


def _recipe(given: list[str]) -> tuple[str, list[str]]:
    """The recipe and the options that change it."""
    if given and not given[0].startswith("-"):
        if given[0] not in RECIPES:
            hint = _did_you_mean(given[0], list(RECIPES))
            raise FlatminimaError(f"unknown recipe {given[0]!r}{hint}: choose from {', '.join(RECIPES)}")
        return given[0], given[1:]
    subject, _ = _parse(_Subject, given, prog="train", add_help=False, return_unknown_args=True)
    if subject.data == "digits":
        return "digits", given
    return (subject.model if subject.model in RECIPES else "resnet20"), given


def _measure(given: list[str]) -> tuple[bool, Report]:
    options = _parse(Measure, given, prog="measure")
    foreign, how = options.foreign, options.measuring.how()
    if bool(options.runs) == (foreign.model is not None):
        raise FlatminimaError("measure takes run folders, or --model with --data (and --checkpoint): give either")
    where: dict[str, Any] = {"device": options.device, "progress": not options.output.no_progress}
    with _standard_output_kept_clean():
        from flatminima.lab.data.sources import load_data
        from flatminima.lab.networks.foreign import load_model
        from flatminima.lab.runs.measuring import measure_run

        if foreign.model is None:
            if foreign.checkpoint or foreign.data:
                raise FlatminimaError("--checkpoint and --data go with --model; a run folder has its own")
            measured = {str(path): measure_run(path, how, **where) for path in options.runs}
        elif foreign.data is None:
            raise FlatminimaError(
                "--model needs its training data too: add --data digits, cifar10, cifar100 or a folder"
            )
        else:
            train_set, _ = load_data(foreign.data)
            model = load_model(foreign.model, foreign.checkpoint, train_set)
            measured = {foreign.model: how.of(model, train_set, **where)}
    bodies = {name: json.loads(characterization.to_json()) for name, characterization in measured.items()}
    tables = [part for name, table in measured.items() for part in (Text(name), table)]
    return options.output.json, Report(bodies if len(bodies) > 1 else next(iter(bodies.values())), Group(*tables))


def _compare(given: list[str]) -> tuple[bool, Report]:
    options = _parse(Compare, given, prog="compare")
    paths = dict(map(_named, options.runs))
    if len(paths) < len(options.runs):
        raise FlatminimaError("two of them have the same name: give them as NAME=FOLDER")
    if options.model is not None and options.data is None:
        raise FlatminimaError("--model needs the training data too: add --data digits, cifar10, cifar100 or a folder")
    how, where = options.measuring.how(), {"device": options.device, "progress": not options.output.no_progress}
    with _standard_output_kept_clean():
        from flatminima.lab.runs.measuring import compare_networks, compare_runs

        if options.data is None:
            comparison = compare_runs(paths, how, **where)
        else:
            comparison = compare_networks(paths, options.data, options.model, how, **where)
    return options.output.json, Report(json.loads(comparison.to_json()), comparison)


def _named(run: str) -> tuple[str, Path]:
    """NAME=PATH taken apart; a path alone is called like its last part."""
    name, equals, path = run.partition("=")
    if equals and not Path(run).exists():
        return name, Path(path)
    return Path(run).resolve().name, Path(run)


def _reproduce(given: list[str]) -> tuple[bool, Report]:
    options = _parse(Reproduce, given, prog="reproduce")
    with _standard_output_kept_clean():
        from flatminima.lab import reproduce
        from flatminima.lab.experiments.paper import EXPERIMENTS
        from flatminima.lab.jobs import Executor, Local, Processes, Ray, available_cores

        known = [*EXPERIMENTS, "all"]
        for name in options.experiments:
            if name not in known:
                raise FlatminimaError(
                    f"unknown experiment {name!r}{_did_you_mean(name, known)}: choose from {', '.join(known)}"
                )
        if not options.experiments:
            raise FlatminimaError(f"reproduce takes experiments: choose from {', '.join(known)}")
        chosen = EXPERIMENTS if "all" in options.experiments else tuple(dict.fromkeys(options.experiments))
        workers = options.workers or available_cores()
        executors: dict[str, Executor] = {"local": Local(), "processes": Processes(workers), "ray": Ray()}
        reproduction = reproduce.Reproduction(
            names=chosen,
            preset=options.preset,
            out=options.out,
            data=options.data,
            seeds=options.seeds,
            executor=executors[options.executor],
            workers=1 if options.executor == "local" else workers,
            trials=options.trials,
        )
        if options.dry_run:
            plan = reproduction.plan()
            shown = reproduce.plan_table(plan, reproduction.workers)
            return options.output.json, Report([dataclasses.asdict(row) for row in plan], shown)
        summaries = reproduction.run(progress=not options.output.no_progress)
        page = Text(f"\n{reproduction.page} shows it in pictures.")
        status = int(any(summary["failures"] for summary in summaries))
        return options.output.json, Report(summaries, Group(reproduce.table(summaries), page), status)


COMMANDS: dict[str, Callable[[list[str]], tuple[bool, Report]]] = {
    "demo": _demo,
    "train": _train,
    "measure": _measure,
    "compare": _compare,
    "reproduce": _reproduce,
}


def _parse(command: type[Options], given: list[str], *, prog: str, **parsing: Any) -> Any:
    """The options given; what is wrong with them as a :class:`FlatminimaError` of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, prog=f"{PROGRAM} {prog}", args=given, **parsing)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        name = prog.split()[0]
        raise FlatminimaError(f"{_unboxed(said.getvalue())} ({PROGRAM} {name} --help explains)") from None


def _unboxed(said: str) -> str:
    """The message in tyro's box, and the names of the options it takes for the ones meant."""
    lines = [_TERMINAL_CODES.sub("", line).strip(" │") for line in said.splitlines()]
    sections: list[list[str]] = [[]]
    for line in filter(None, lines[1:]):  # the first is the title
        if set(line) <= set("─╰╯-"):
            sections.append([])
        else:
            sections[-1].append(line)
    sections = [section for section in sections if section]
    message = re.sub(r"^Error parsing run[.\w]*: | Got errors:.*", "", " ".join(sections[0])).rstrip(".")
    suggested = sections[1] if len(sections) > 1 and sections[1][:1] == ["Perhaps you meant:"] else []
    names = [name for line in suggested if line.startswith("-") for name in re.findall(r"--[\w.-]+", line)[:1]]
    return f"{message}; perhaps you meant {' or '.join(names)}" if names else message


@contextlib.contextmanager
def _standard_output_kept_clean() -> Iterator[None]:
    """What other code prints goes to standard error: standard output is the report's."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _did_you_mean(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields as they are (``dataclasses.asdict`` would take nested ones apart)."""
    return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}


def _say(text: str, *, by_any: bool = False) -> None:
    """Say it on standard error; of several processes the first alone, unless it may be news to that one."""
    if by_any or Processes.launched().rank == 0:
        print(f"{PROGRAM}: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201


def _fail(text: str, status: int, debug: bool, *, by_any: bool = False) -> int:
    if debug:
        traceback.print_exc()
    _say(text, by_any=by_any)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
