"""``flatminima track``: the checkpoints of trainings in, out how their measures went."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Group
from tyro.conf import OmitArgPrefixes, Positional, arg

from flatminima.cli.options import NETWORKS, SOURCES, MeasuringOptions, Output, ReadingOptions, parse
from flatminima.cli.output import Files, Report, require_place_of_picture, say, starting, with_files, working
from flatminima.errors import FlatminimaError, require
from flatminima.files import require_writable

TRIALS = 10


@dataclass(frozen=True)
class Track:
    """Measure the checkpoints of trainings, all on the same subsets, in the order of their steps or epochs.

    Takes checkpoints of a --model (.safetensors, .pt, .pth, .ckpt), folders of Transformers' Trainer, and run folders.
    A checkpoint's number is the one in its name, behind step or epoch, or the last; NUMBER=CHECKPOINT says it where the
    name does not. A folder of checkpoints is a run.

    Example: flatminima track runs/*/checkpoint-* --data reviews.csv --test-data reviews-test.csv --plot epochs.pdf

    Example: flatminima track epochs/*.pt --model mypackage.nets:build --data photos --normalize imagenet
    """

    checkpoints: Annotated[Positional[tuple[str, ...]], arg(metavar="CHECKPOINT")] = ()
    """Checkpoints, as PATH or NUMBER=PATH."""
    model: Annotated[str | None, arg(aliases=("-m",), help=f"What the checkpoints are of: {NETWORKS}.")] = None
    data: Annotated[str | None, arg(aliases=("-d",), help=f"Their training data: {SOURCES}.")] = None
    test_data: str | None = None
    """Data for a test error at every checkpoint, from where --data may be; the part test, if there are parts."""
    test_split: str | None = None
    """Another part of them."""
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)
    out: Annotated[Path, arg(aliases=("-o",))] = Path("tracked.jsonl")
    """File that keeps what is measured, a line of JSON for every checkpoint: none is measured twice."""
    plot: Path | None = None
    """Also draw γ̂'s parts and the errors over steps or epochs, into a file .pdf, .svg, .png and the like."""
    measuring: OmitArgPrefixes[MeasuringOptions] = field(default_factory=lambda: MeasuringOptions(trials=TRIALS))
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure (auto: on a GPU if there is one)."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


def track(given: list[str]) -> tuple[bool, Report]:
    """Options in, a report out."""
    options = parse(Track, given, prog="track")
    if not options.checkpoints:
        raise FlatminimaError("track takes checkpoints, such as runs/*/checkpoint-*, or epoch-*.pt with --model")
    if options.data is None:
        raise FlatminimaError("track needs the training data: add --data")
    require(options.test_data is not None or options.test_split is None, "--test-split goes with --test-data")
    with working("track", options.output):
        with starting():
            from flatminima.lab.data import open_data, open_test_data
            from flatminima.lab.reports import tracked_table, write_tracked_picture
            from flatminima.lab.runs import Subject, in_order, measure_checkpoints, said_order

        checkpoints = in_order(options.checkpoints)
        require_writable(options.out)
        if options.plot is not None:
            require_place_of_picture(options.plot)
        say(f"the order: {said_order(checkpoints)}")
        reading = options.reading.plain()
        opened = open_data(options.data, reading)
        test = None
        if options.test_data is not None:
            test = open_test_data(options.test_data, reading, options.test_split, classes=opened.classes)
        for each in (opened, test):
            if each is not None and each.about:
                say(each.about)
        subject = Subject(options.model, opened.data, reading, None if test is None else test.data)
        tracked = measure_checkpoints(
            checkpoints,
            subject,
            options.measuring.how(),
            options.out,
            device=options.device,
            progress=not options.output.no_progress,
        )
        require(len(tracked) > 0, "none of the checkpoints could be measured")
        files = Files()
        files.write("plot", options.plot, "shows it as a picture.", lambda path: write_tracked_picture(tracked, path))
    rows = [
        {
            "checkpoint": str(each.checkpoint.path),
            "run": each.checkpoint.run,
            each.checkpoint.unit: each.checkpoint.number,
            **each.test,
            "preparation": each.preparation,
            "characterization": json.loads(each.characterization.to_json()),
        }
        for each in tracked
    ]
    done = {each.checkpoint for each in tracked}
    left_out = [str(checkpoint.path) for checkpoint in checkpoints if checkpoint not in done]
    body = files.named_in(with_files({"checkpoints": rows, "left_out": left_out}, out=options.out))
    shown = Group(tracked_table(tracked), *files.shown)
    return options.output.json, Report(body, shown, status=int(bool(left_out)), unwritten=files.unwritten)
