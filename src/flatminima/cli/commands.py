"""What each command does: options in, a report out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Group
from rich.text import Text
from tyro.conf import arg

from flatminima.cli.evaluate import evaluate
from flatminima.cli.options import (
    PROGRAM,
    REGULARIZERS,
    Compare,
    Demo,
    Measure,
    Reproduce,
    RunOptions,
    Train,
    parse,
)
from flatminima.cli.output import Files, Report, require_place_of_picture, say, starting, with_files, working
from flatminima.cli.track import track
from flatminima.errors import FlatminimaError, require, require_one_of
from flatminima.files import require_writable, write_file
from flatminima.lab.reading import Reading
from flatminima.lab.runs import RECIPES
from flatminima.progress import track_parts

if TYPE_CHECKING:
    from flatminima.lab.data import Normalization, OwnData, Preparation
    from flatminima.measures import Comparison

    Preparations = Normalization | Preparation


def _demo(given: list[str]) -> tuple[bool, Report]:
    options = parse(Demo, given, prog="demo")
    with working("demo", options.output):
        with starting():
            from flatminima.lab import demo
            from flatminima.lab.experiments import json_of
            from flatminima.lab.study import table

        page = options.out / "report.html"
        require_writable(page)
        report = demo.demo(options.out, workers=options.workers, progress=not options.output.no_progress)
        shown = Text(f"\n{page} shows it in pictures ({report.seconds:.0f} s).")
        status = int(any(summary.failures for summary in report.summaries))
        found = with_files({"experiments": json_of(report.summaries), "seconds": report.seconds}, report=page)
        return options.output.json, Report(found, Group(table(report.summaries), shown), status)


def _train(given: list[str]) -> tuple[bool, Report]:
    recipe, rest = recipe_of(given)
    about = inspect.cleandoc(Train.__doc__ or "")
    options = parse(
        Train,
        [argument for argument in rest if argument not in [f"--{name}" for name in REGULARIZERS]],
        prog="train [RECIPE]",
        description=f"{about}\n\nRecipes: {', '.join(RECIPES)}. The defaults below are those of {recipe!r}.",
        default=Train(RunOptions.of(RECIPES[recipe])),
    )
    spec = options.run.spec(
        [name for name in REGULARIZERS if any(re.match(rf"--{name}(\.|$)", argument) for argument in rest)]
    )
    with working("train", options.output):
        with starting():
            from flatminima.lab.networks import resolve_device
            from flatminima.lab.runs import RunFolder, train

        folder = RunFolder.of(options.root, spec)
        before = folder.status
        if before == "unfinished":
            say(f"going on with the unfinished run in {folder.path}")
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


def recipe_of(given: list[str]) -> tuple[str, list[str]]:
    """The recipe and the options that change it."""
    if given and not given[0].startswith("-"):
        require_one_of("recipe", given[0], RECIPES)
        return given[0], given[1:]
    subject, _ = parse(_Subject, given, prog="train", add_help=False, return_unknown_args=True)
    if subject.data == "digits":
        return "digits", given
    return (subject.model if subject.model in RECIPES else "resnet20"), given


def _measure(given: list[str]) -> tuple[bool, Report]:
    options = parse(Measure, given, prog="measure")
    foreign, reading, how = options.foreign, options.reading.plain(), options.measuring.how()
    if bool(options.runs) == (foreign.model is not None):
        raise FlatminimaError("measure takes run folders, or --model with --data (and --checkpoint): give either")
    if foreign.model is None and (foreign.checkpoint or foreign.data or reading != Reading()):
        raise FlatminimaError(f"--checkpoint, --data{_and_given(reading)} go with --model; a run folder has its own")
    if foreign.model is not None and foreign.data is None:
        raise FlatminimaError(f"--model needs its training data too: add --data {_SOME_DATA}")
    where: dict[str, Any] = {"device": options.device, "progress": not options.output.no_progress}
    with working("measure", options.output):
        with starting():
            from flatminima.lab.runs import load_network, measure_images, measure_run

        prepared: dict[str, Preparations] = {}
        if foreign.model is None:
            runs = track_parts({str(path): path for path in options.runs})
            measured = {name: measure_run(path, how, **where) for name, path in runs}
        else:
            data = _opened_data(foreign.data, reading)
            network = load_network(foreign.model, foreign.checkpoint, data, reading)
            prepared[foreign.model] = network.preparation
            measured = {foreign.model: measure_images(network.model, network.data, how, **where)}
    bodies = {name: json.loads(characterization.to_json()) for name, characterization in measured.items()}
    for name, preparation in prepared.items():
        bodies[name][_kind(preparation)] = preparation.as_json()
    tables = [part for name, table in measured.items() for part in (Text(name), table)]
    shown = Group(*tables, *_preparation_lines(prepared))
    return options.output.json, Report(bodies if len(bodies) > 1 else next(iter(bodies.values())), shown)


_SOME_DATA = "digits, cifar10, a folder, a file, hf:NAME or package.module:factory"


def _opened_data(source: str, reading: Reading) -> OwnData:
    """Training data, and said what was taken for what."""
    from flatminima.lab.data import open_data

    opened = open_data(source, reading)
    if opened.about:
        say(opened.about)
    return opened.data


def _and_given(reading: Reading) -> str:
    """The options of reading that were given, as they are typed."""
    given = [entry.name for entry in dataclasses.fields(reading) if getattr(reading, entry.name) != entry.default]
    return "".join(f" and --{name.replace('_', '-')}" for name in given)


def _preparation_lines(prepared: Mapping[str, Preparations]) -> list[Text]:
    said = {"normalization": "Pixels of 0 to 1 were normalized for", "preparation": "Inputs were made for"}
    return [Text(f"{said[_kind(preparation)]} {name}: {preparation}.") for name, preparation in prepared.items()]


def _kind(preparation: Preparations) -> str:
    return type(preparation).__name__.lower()


def _compare(given: list[str]) -> tuple[bool, Report]:
    options = parse(Compare, given, prog="compare")
    paths, reading = dict(map(_named, options.runs)), options.reading.plain()
    if len(paths) < len(options.runs):
        raise FlatminimaError("two of them have the same name: give them as NAME=FOLDER")
    require(all(paths), "a name is empty: give NAME=FOLDER, or the folder alone")
    if options.model is not None and options.data is None:
        raise FlatminimaError(f"--model needs the training data too: add --data {_SOME_DATA}")
    if options.data is None and reading != Reading():
        raise FlatminimaError(
            f"{_and_given(reading).removeprefix(' and ')} goes with --model and --data; run folders know how "
            "their images were normalized"
        )
    if reading.normalize is not None and options.model is None and not any(":" in str(path) for path in paths.values()):
        raise FlatminimaError("--normalize goes with --model; run folders know how their images were normalized")
    require(
        options.workers == 1 or options.data is None,
        "--workers goes with run folders and their own images: networks on --data are measured in this process",
    )
    how, where = options.measuring.how(), {"device": options.device, "progress": not options.output.no_progress}
    require(
        options.plot is None or how.batchnorm == "eval",
        "--plot shows γ̂'s parts, and with batch statistics there are none: leave out --plot or --batchnorm",
    )
    prepared: dict[str, Preparations] = {}
    with working("compare", options.output):
        _require_places(options)  # now, not after all measuring

        with starting():
            from flatminima.lab.runs import compare_loaded, compare_runs, load_networks

        if options.data is None:
            comparison = compare_runs(paths, how, workers=options.workers, **where)
        else:
            data = _opened_data(options.data, reading)
            networks = load_networks(paths, data, options.model, reading)
            prepared = {name: network.preparation for name, network in networks.items()}
            comparison = compare_loaded(networks, how, **where)
    body = json.loads(comparison.to_json())
    for name, preparation in prepared.items():
        body.setdefault(f"{_kind(preparation)}s", {})[name] = preparation.as_json()
    files = Files()
    files.write("report", options.report, "shows it in pictures.", lambda path: _write_page(comparison, path))
    files.write("plot", options.plot, "shows γ̂'s parts.", lambda path: _write_parts(comparison, path))
    files.write("table", options.table, "has the table.", lambda path: _write_table(comparison, path))
    shown = Group(comparison, *_preparation_lines(prepared), *files.shown)
    return options.output.json, Report(files.named_in(body), shown, unwritten=files.unwritten)


def _write_page(comparison: Comparison, path: Path) -> None:
    from flatminima.pages.comparison import report

    report(comparison, path)


def _write_parts(comparison: Comparison, path: Path) -> None:
    from flatminima.pictures import write_picture

    write_picture(comparison.plot().figure, path)


def _write_table(comparison: Comparison, path: Path) -> None:
    write_file(path, comparison.to_latex() if path.suffix == ".tex" else comparison.to_markdown())


def _require_places(options: Compare) -> None:
    """Refuse files that could not be written."""
    if options.report is not None:
        require_writable(options.report)
    if options.plot is not None:
        require_place_of_picture(options.plot)
    if options.table is not None:
        if options.table.suffix not in (".tex", ".md"):
            raise FlatminimaError(f"cannot write the table {options.table}: give it the suffix .tex or .md")
        require_writable(options.table)


def _named(run: str) -> tuple[str, Path]:
    """NAME=PATH taken apart; a path alone is called like its last part."""
    name, equals, path = run.partition("=")
    if equals and not Path(run).exists():
        return name, Path(path)
    return (run if ":" in run and not Path(run).exists() else Path(run).resolve().name), Path(run)


def _reproduce(given: list[str]) -> tuple[bool, Report]:
    options = parse(Reproduce, given, prog="reproduce")
    with working("reproduce", options.output):
        with starting():
            from flatminima.lab import reproduce
            from flatminima.lab.experiments import EXPERIMENTS, json_of
            from flatminima.lab.jobs import Executor, Local, Ray, WorkerPool, available_cores
            from flatminima.lab.study import table

        known = [*EXPERIMENTS, "all"]
        for name in options.experiments:
            require_one_of("experiment", name, known)
        if not options.experiments:
            raise FlatminimaError(f"reproduce takes experiments: choose from {', '.join(known)}")
        wanted = EXPERIMENTS if "all" in options.experiments else options.experiments
        workers = options.workers or available_cores()
        executors: dict[str, Executor] = {"local": Local(), "processes": WorkerPool(workers), "ray": Ray()}
        reproduction = reproduce.Reproduction(
            names=tuple(wanted),
            preset=options.preset,
            protocol=options.protocol,
            out=options.out,
            data=options.data,
            seeds=options.seeds,
            executor=executors[options.executor],
            workers=1 if options.executor == "local" else workers,
            measures=options.measures,
            trials=options.trials,
            records=options.records,
        )
        if options.dry_run:
            plan = reproduction.plan()
            shown = reproduce.plan_table(plan, reproduction.workers)
            rows = [dataclasses.asdict(row) for row in plan]
            return options.output.json, Report({"plan": rows, "workers": reproduction.workers}, shown)
        require_writable(reproduction.page)
        if options.no_runs:
            summaries = reproduction.report_finished()
        else:
            summaries = reproduction.run(progress=not options.output.no_progress)
        page = Text(f"\n{reproduction.page} shows it in pictures.")
        status = int(any(summary.failures for summary in summaries))
        found = with_files({"experiments": json_of(summaries)}, report=reproduction.page)
        return options.output.json, Report(found, Group(table(summaries), page), status)


COMMANDS: dict[str, Callable[[list[str]], tuple[bool, Report]]] = {
    "demo": _demo,
    "train": _train,
    "measure": _measure,
    "compare": _compare,
    "track": track,
    "evaluate": evaluate,
    "reproduce": _reproduce,
}
