r"""Is the regularizer's gain under label noise that of early stopping? Errors after every epoch, with it and without.

    python benchmarks/early_stopping.py --threads 1
    python benchmarks/early_stopping.py --threads 1 --preset medium --cases "20 % label noise, no-aug" \
        --arms plain --data path/to/cifar --output early_stopping-cifar

The networks with label noise of Table 1, at its settings, and as many images are held out as in the search for β. These
have their own labels, which is the best that early stopping can have. Seeds are those of Table 1, but as images are
held out, these are other runs. Finished runs are kept in the record, and not repeated by a second call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import harness
from flatminima.lab.experiments import PLAIN, PRESETS, REGULARIZED
from flatminima.lab.reproduce import Reproduction
from flatminima.lab.runs import RunFolder, RunSpec, train

RECORDS = Path(__file__).parents[1] / "results"


def curves(spec: RunSpec) -> dict[str, list[float]]:
    """Test error and error on the held-out images after every epoch."""
    with tempfile.TemporaryDirectory() as folder:
        train(spec, folder, progress=False)
        epochs = RunFolder.of(folder, spec).read_history()
    return {name: [getattr(epoch, name) for epoch in epochs] for name in ("test_error", "validation_error")}


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("digits", "medium"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help="all of the preset that have label noise, if not given"
    )
    parser.add_argument("--arms", nargs="+", choices=(PLAIN, REGULARIZED), default=[PLAIN, REGULARIZED])
    parser.add_argument("--data", type=Path, help="a folder of CIFAR-10's parquet files")
    options = harness.parse(parser)
    torch.set_num_threads(options.threads)
    name = options.output or "early_stopping"
    path = harness.RESULTS / f"{name}.json"
    runs: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    table = Reproduction(
        ("table-1",), options.preset, Path("reproduction"), options.data, records=RECORDS / options.preset
    ).experiment("table-1")
    settings = [
        setting
        for setting in table.settings
        if setting.arm in options.arms and setting.spec.confusion and setting.case in (options.cases or table.cases)
    ]
    for seed, setting in itertools.product(options.seeds, settings):
        own = runs.setdefault(setting.case, {}).setdefault(setting.arm, {})
        if str(seed) not in own:
            held_out = PRESETS[options.preset].validation
            own[str(seed)] = curves(replace(setting.spec, seed=seed, validation=held_out, evaluate_every=1))
            print(
                f"{setting.case}, seed {seed}, {setting.arm}: ends at {own[str(seed)]['test_error'][-1]:.2%}",
                flush=True,
            )
            harness.write_json(name, {"environment": harness.environment(options), "runs": runs})


if __name__ == "__main__":
    main()
