from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flatminima.lab.errors import ResumedElsewhereWarning, TrainingInterrupted
from flatminima.lab.networks.paper import build_model
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.session import Session
from flatminima.lab.runs.sets import load_sets
from flatminima.lab.runs.spec import (
    FisherPenaltySpec,
    GradientNormSpec,
    Regularizer,
    RegularizerSpec,
    RunSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)
from flatminima.lab.runs.training import train
from flatminima.measures.evaluation import evaluate
from flatminima.network.precision import float32_products, float32_switches
from support.runs import ALL, BATCHNORM, EVERYTHING, PLAIN, RIVALS, SHARPNESS, bits, interrupting, stopped_in_the_middle

pytest_plugins = ("support.run_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "regularizer",
    [
        None,
        RegularizerSpec(num_sub_batches=4, beta=1.0),
        SharpnessAwareSpec(0.01),
        GradientNormSpec(0.005, 0.01),
        FisherPenaltySpec(),
        UnitResidualSpec(num_sub_batches=4),
    ],
)
def test_bf16_trains_and_is_evaluated_in_float32(tmp_path: Path, regularizer: Regularizer | None) -> None:
    full = replace(PLAIN, iterations=8, regularizer=regularizer)
    mixed = replace(full, precision="bf16-mixed")
    in_full, in_mixed = train(full, tmp_path), train(mixed, tmp_path)
    assert in_full.train_loss != in_mixed.train_loss
    assert in_full.train_loss == pytest.approx(in_mixed.train_loss, rel=0.1)
    weights = RunFolder.of(tmp_path, mixed).read_checkpoint()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    model = build_model("mlp", in_channels=1)
    model.load_state_dict(weights)
    assert evaluate(model, load_sets(mixed).train).loss == in_mixed.train_loss


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What dynamo takes from networks is run as it is, without the minutes that Inductor needs, and listed."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, *, dynamic, mode: compile_(model, backend=backend, dynamic=dynamic)
    )
    return found


@pytest.mark.parametrize("name", ["plain", "everything", "sparse", "sam", *RIVALS])
def test_a_compiled_run_is_the_same_up_to_rounding_and_resumes(
    name: str, tmp_path: Path, uninterrupted: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    spec = replace(SHARPNESS, model="mlp") if name == "sam" else ALL[name]
    result = train(spec, tmp_path / "compiled", compile=True)
    assert len(graphs) > 0
    assert result.environment["compiled"] is True
    if name != "sam":
        expected = RunFolder.of(uninterrupted, spec).read_checkpoint()
        found = RunFolder.of(tmp_path / "compiled", spec).read_checkpoint()
        assert found.keys() == expected.keys()  # the network's own names
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-2, atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, at=5, times=1)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(TrainingInterrupted):
            train(spec, tmp_path / "stopped", compile=True)
        signal.signal(signal.SIGINT, handler)
    train(spec, tmp_path / "stopped", compile=True)
    assert bits(tmp_path / "stopped", spec) == bits(tmp_path / "compiled", spec)


def test_a_run_that_goes_on_compiled_says_so(tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    stopped_in_the_middle(PLAIN, tmp_path)
    with pytest.warns(ResumedElsewhereWarning, match="goes on with .* compiled True"):
        train(PLAIN, tmp_path, compile=True)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
@pytest.mark.parametrize("spec", [PLAIN, BATCHNORM, EVERYTHING], ids=["plain", "batchnorm", "everything"])
def test_a_run_compiled_by_inductor(spec: RunSpec, tmp_path: Path) -> None:
    spec = replace(spec, precision="32-true")
    eager = train(spec, tmp_path / "eager")
    compiled = train(spec, tmp_path / "compiled", compile=True)
    assert compiled.train_loss == pytest.approx(eager.train_loss, rel=1e-2)
    stopped_in_the_middle(spec, tmp_path / "stopped", compile=True)
    train(spec, tmp_path / "stopped", compile=True)
    assert bits(tmp_path / "stopped", spec) == bits(tmp_path / "compiled", spec)


@pytest.mark.parametrize("precision", ["32-true", "tf32"])
def test_tf32_is_used_if_and_only_if_it_is_asked_for(
    precision: Any, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the caller has chosen, which is left as it was; on the CPU there is none, so the bits are the same."""

    def switches() -> list[Any]:
        return [getattr(holder, name) for holder, name, _, _ in float32_switches()]

    seen: list[list[Any]] = []
    backward = Session.backward

    def observed(run: Session, *batch: torch.Tensor) -> Any:
        seen.append(switches())
        return backward(run, *batch)

    monkeypatch.setattr(Session, "backward", observed)
    spec = replace(PLAIN, precision=precision)
    with float32_products(tf32=precision == "32-true"):
        before = switches()
        train(spec, tmp_path)
        assert switches() == before
    exact, fast = ([switch[i] for switch in float32_switches()] for i in (2, 3))
    assert seen == [fast if precision == "tf32" else exact] * 10
    checkpoints = [
        RunFolder.of(root, s).path / "checkpoint.safetensors" for root, s in ((tmp_path, spec), (uninterrupted, PLAIN))
    ]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()
