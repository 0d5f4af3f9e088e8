"""Made-up ledgers, with ties in everything, for what judges measures."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from flatminima.protocols import Ledger

COLUMNS: dict[str, Any] = {
    "error": "error",
    "given": "loss",
    "hyper_parameters": ["lr", "optimizer"],
    "measures": ["x"],
    "test_size": 1000,
}


def random_frame(number: int, *, seeds: int | None = None) -> pd.DataFrame:
    """Minima of settings that repeat or are missing; or with seeds, every one of six settings with every seed."""
    generator = np.random.default_rng(number)
    if seeds is None:
        n = int(generator.integers(5, 30))
        frame = pd.DataFrame({"lr": generator.choice([0.1, 0.2, 0.4], n), "optimizer": generator.choice(["a", "b"], n)})
    else:
        rows = [(lr, kind, seed) for lr in (0.1, 0.2, 0.4) for kind in ("a", "b") for seed in range(seeds)]
        frame, n = pd.DataFrame(rows, columns=["lr", "optimizer", "seed"]), len(rows)
    return frame.assign(
        x=generator.integers(0, 8, n).astype(float),
        loss=generator.integers(0, 6, n) / 10,
        error=generator.integers(0, 12, n) / 20,
        setting=[f"{lr} {kind}" for lr, kind in zip(frame["lr"], frame["optimizer"], strict=True)],
    )


def ledger_of(frame: pd.DataFrame, **changed: Any) -> Ledger:
    """With the columns of :func:`random_frame`."""
    return Ledger.of(frame, **{**COLUMNS, **changed})


def normalized_information(frame: pd.DataFrame, columns: list[str], times: Any = None) -> float:
    """I / H over ordered pairs of different minima, each pair so many ``times``, (n, n)."""
    times = np.ones((len(frame), len(frame))) if times is None else times
    rows = list(frame.itertuples())
    pairs: Counter[tuple[object, bool, bool]] = Counter()
    for i, j in itertools.permutations(range(len(rows)), 2):
        a, b = rows[i], rows[j]
        values = tuple((getattr(a, name), getattr(b, name)) for name in columns)
        pairs[values, a.x > b.x, a.error > b.error] += times[i][j]
    total, information, entropy = sum(pairs.values()), 0.0, 0.0
    for values in {key[0] for key in pairs}:
        p = {(x, e): pairs[values, x, e] / total for x in (False, True) for e in (False, True)}
        here = sum(p.values())
        for (x, e), joint in p.items():
            if joint:
                of_x, of_e = p[x, False] + p[x, True], p[False, e] + p[True, e]
                information += joint * math.log(joint * here / (of_x * of_e))
                entropy -= joint * math.log(of_e / here)
    return information / entropy if entropy > 1e-15 else math.nan
