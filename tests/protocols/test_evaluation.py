"""What is said of measures whose relation to the error is made."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from flatminima.protocols import Evaluation, Evidence, Ledger, described, evaluate, kendall, partial_kendall, sign_error
from support.ledgers import ledger_of, random_frame


def made(seeds: int = 12, given: str | None = "loss") -> Evaluation:
    """The error comes of the loss and of something else; one measure follows the loss, one the rest, one neither."""
    generator = np.random.default_rng(0)
    frame = pd.DataFrame([(lr, seed) for lr in range(4) for seed in range(seeds)], columns=["lr", "seed"])
    rest, loss = frame["lr"] + 0.3 * generator.normal(size=len(frame)), generator.normal(size=len(frame))
    frame = frame.assign(
        loss=loss,
        repeats=loss + 0.2 * generator.normal(size=len(frame)),
        adds=rest,
        opposes=-rest,
        noise=generator.normal(size=len(frame)),
        constant=1.0,
        error=0.5 + 0.05 * (loss + rest),
    )
    names = ["repeats", "adds", "opposes", "noise", "constant"]
    ledger = Ledger.of(
        frame, error="error", given=given, hyper_parameters=["lr"], measures=names, seed="seed", test_size=1000
    )
    return evaluate(ledger)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return made()


def test_what_counts_is_what_a_measure_adds(evaluation: Evaluation) -> None:
    verdicts = {name: evidence.verdict("loss") for name, evidence in evaluation.measures.items()}
    assert verdicts == {
        "repeats": "may repeat",
        "adds": "follows",
        "opposes": "goes against",
        "noise": "shows nothing",
        "constant": "undefined",
    }
    assert evaluation.measures["repeats"].kendall.above_zero  # which alone would be taken for a finding


def test_the_conclusions_say_it_in_words(evaluation: Evaluation) -> None:
    lines = evaluation.conclusions()
    assert lines[0].startswith("48 minima of 4 settings, ordered by error. Of loss alone, τ = ")
    adds = described(evaluation.measures["adds"].partial_kendall)
    assert lines[1] == f"Say something about the error beyond loss: adds (partial τ = {adds})."
    assert lines[2].startswith("Go against the error beyond loss (the more of it, the less error): opposes (")
    assert lines[3].startswith("Follow or oppose the error no more than a noisy copy of loss might: repeats (partial τ")
    assert lines[4] == "Show no clear relation to the error beyond loss (the interval holds zero): noise."
    assert lines[5] == "Not to be judged, as the measure is the same at all minima: constant."
    assert lines[6].startswith("Of 4 intervals that each miss in one case of twenty, 0.2 would")
    assert len(lines) == 7
    assert evaluation.conclusions({"loss": "training loss", "adds": "Σ"})[1].startswith(
        "Say something about the error beyond training loss: Σ ("
    )


def test_the_error_under_another_name_is_pointed_out() -> None:
    frame = random_frame(1, seeds=4).assign(accuracy=lambda frame: 1 - frame["error"])
    lines = evaluate(ledger_of(frame, measures=["x", "accuracy"])).conclusions()
    assert "Exactly in the order of the error: accuracy. Is that the error under another name?" in lines


def test_few_seeds_are_warned_of() -> None:
    assert made(seeds=4).conclusions()[-1] == (
        "Intervals rest on 4 seeds: of so few, percentile intervals are too narrow."
    )


def test_without_anything_given_the_open_question_is_said() -> None:
    found = made(given=None)
    assert found.baseline is None
    assert "whether a measure only repeats the training loss remains open" in found.conclusions()[0]
    assert "repeats (τ = " in found.conclusions()[1]


def test_everything_is_plain_data(evaluation: Evaluation) -> None:
    values = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert list(values["measures"]["adds"]) == [*Evidence.__dataclass_fields__]
    assert values["measures"]["adds"]["kendall"]["interval"] == list(evaluation.measures["adds"].kendall.interval or ())
    assert values["baseline"]["partial_kendall"] == {
        "value": None,
        "interval": None,
        "n": 48,
        "reason": "loss is what is given",
    }


def test_an_evaluation_is_its_protocols(evaluation: Evaluation) -> None:
    frame = pd.DataFrame({"lr": [1] * 5 + [2] * 5, "x": range(10), "loss": [1, 2] * 5, "error": np.arange(10) / 10})
    ledger = Ledger.of(frame, error="error", given="loss", hyper_parameters=["lr"], measures=["x"])
    done: list[str] = []
    found = evaluate(ledger, done.append).measures["x"]
    assert done == ["x"]
    assert found.kendall == kendall(ledger, "x")
    assert found.partial_kendall == partial_kendall(ledger, "x")
    assert found.sign_error == sign_error(ledger, "x")
