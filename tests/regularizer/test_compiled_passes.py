"""``passes="compiled"``: the same numbers from a compiled graph; and a clear word where none can be made."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_sub_batches import REFUSED, TOGETHER, Checkpointed, Lambda, Square, assert_refused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatminima.errors import FlatminimaError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.regularizer_cases import (
    BACKENDS,
    CASES,
    SEED,
    Case,
    CountingBackend,
    assert_same_bits,
    gradients_of,
    make,
    mlp,
    snapshot,
)
from support.regularizer_cases import assert_same as assert_same_numbers
from support.versions import needs_newer_compiler

compile_by = torch.compile

TRACED = {name: case for name, case in TOGETHER.items() if name != "batchnorm-cumulative"} | {
    "old-function": Case(lambda: Lambda(Square.apply)),
    "checkpoint": Case(Checkpointed),
}
NOT_TRACED = {name: REFUSED[name] for name in ("item", "control-flow", "recurrent", "sparse-embedding")} | {
    "batchnorm-cumulative": TOGETHER["batchnorm-cumulative"]
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.xdist_group("compiler"),  # importing dynamo takes seconds
]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``torch.compile`` uses: all of it but Inductor, which takes ten times as long."""
    chosen = getattr(request, "param", "aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(compile_by, backend=chosen))
    return chosen


def step(case: Case, passes: str, *, samples: int = 24, **options: Any) -> list[dict[str, Tensor | None]]:
    """The second step's gradients, numbers and buffers."""
    model, inputs, targets = make(case, samples=samples)
    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, alpha=0.05, beta=3.0, passes=passes, **options)  # type: ignore[arg-type]
    for _ in range(2):
        model.zero_grad()
        loss = regularizer.backward(case.loss_fn, inputs, targets)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01)
    return [gradients_of(model), {**vars(regularizer.last_step), "loss": loss}, dict(model.named_buffers())]


assert_same = functools.partial(assert_same_numbers, rtol=1e-10, atol=1e-12)


SIZES = {
    "equal": {"num_sub_batches": 4, "main_gradient": "sub-batches"},
    "unequal": {"num_sub_batches": 5, "main_gradient": "sub-batches"},
    "main": {"num_sub_batches": 4},
    "whole-batch": {"num_sub_batches": 5, "batch_statistics": "whole-batch"},
    "running": {"num_sub_batches": 5, "batch_statistics": "running"},
}
TWO_GRAPHS = ("batchnorm", "reassigned-buffer", "counting-noise")
"""What the graph of one size leaves (buffers, generator) is where that of the next size starts; for the others the
second graph is the first once more."""


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(
            case,
            options,
            id=f"{sizes}-{name}",
            marks=[
                *([] if sizes == ("unequal" if name in TWO_GRAPHS else "equal") else [pytest.mark.slow]),
                *([needs_newer_compiler] if name == "old-function" else []),
            ],
        )
        for sizes, options in SIZES.items()
        for name, case in TRACED.items()
    ],
)
def test_compiled_gives_the_same_numbers(backend: str, case: Case, options: dict[str, Any]) -> None:
    assert_same(*(step(case, passes, **options) for passes in ("compiled", "one-by-one")))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", NOT_TRACED.values(), ids=NOT_TRACED)
def test_what_cannot_be_traced_is_refused_and_leaves_no_trace(case: Case) -> None:
    assert_refused(case, "compiled", r"cannot make one graph of .* loss \(.*[^:]\): choose passes='one-by-one'")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_dropout_uses_one_mask_for_both_passes_and_another_for_every_sub_batch(backend: str) -> None:
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3)).double()

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    batch = torch.ones(8, 6).double(), torch.zeros(8).long()
    regularizer = FisherTraceRegularizer(model, alpha=1e-6, num_sub_batches=4, passes="compiled")
    penalty = regularizer.penalize(closure, batch)
    assert penalty is not None
    assert penalty.trace > 1.01 * sum(g.square().sum() for g in penalty.main_gradient)
    model.eval()  # the size of a difference without noise
    exact = FisherTraceRegularizer(model, alpha=1e-6, num_sub_batches=4).penalize(closure, batch)
    assert exact is not None
    assert sum(g.square().sum() for g in penalty.gradient) < 100 * sum(g.square().sum() for g in exact.gradient)


@pytest.mark.parametrize("backend", [CountingBackend()], indirect=True)
@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_both_passes_share_one_graph_and_only_new_sizes_make_more(backend: CountingBackend) -> None:
    model, inputs, targets = make(CASES["batchnorm"])
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4, passes="compiled")
    made = []
    for samples in (24, 24, 16, 16, 24):
        before = backend.graphs
        regularizer.backward(lambda output, y: F.cross_entropy(output, y), inputs[:samples], targets[:samples])
        made.append(backend.graphs - before)
    assert made == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("backend", ["eager"], indirect=True)
@pytest.mark.usefixtures("backend")
@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_graphs_of_other_models_do_not_count_towards_the_limit() -> None:
    """``torch.compile`` keeps eight graphs for each piece of code; here one."""
    limits = importlib.import_module("torch._dynamo.config")
    limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
    with limits.patch(**{limit: 1}):
        for width in (2, 3, 4):
            model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
            regularizer = FisherTraceRegularizer(model, num_sub_batches=4, passes="compiled")
            regularizer.backward(F.cross_entropy, torch.randn(8, 6), torch.zeros(8).long())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda model: model.compile() or model, id="compile"),
        pytest.param(DistributedDataParallel, id="ddp", marks=needs_newer_compiler),
    ],
)
@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_models_compiled_in_place_and_on_several_processes(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    results = []
    try:
        for passes in ("compiled", "one-by-one"):
            model, inputs, targets = make(CASES["batchnorm"])
            torch.manual_seed(SEED)
            regularizer = FisherTraceRegularizer(
                wrap(model), alpha=0.05, num_sub_batches=4, passes=passes, main_gradient="sub-batches"
            )
            for _ in range(2):
                regularizer.backward(F.cross_entropy, inputs, targets)
            results.append([gradients_of(model), dict(model.named_buffers())])
    finally:
        dist.destroy_process_group()
    assert_same(*results)


def test_wrapped_models_are_refused() -> None:
    for model in (compile_by(mlp()), nn.Sequential(compile_by(mlp()))):
        with pytest.raises(FlatminimaError, match=r"torch.compile has wrapped: compile in place \(model.compile\(\)\)"):
            FisherTraceRegularizer(model, passes="compiled")


@pytest.mark.usefixtures("backend")
def test_weights_that_cannot_be_swapped_are_refused() -> None:
    model, inputs, targets = make(CASES["mlp"])
    captured = next(iter(model.parameters()))
    regularizer = FisherTraceRegularizer(model, passes="compiled")
    with pytest.raises(FlatminimaError, match=r"uses parameter 0.weight itself.*choose passes='one-by-one'"):
        regularizer.penalize(lambda b: F.cross_entropy(model(b[0]), b[1]) + captured.square().sum(), (inputs, targets))


def interrupted(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("backend", [interrupted], indirect=True)
def test_interrupt_while_compiling_leaves_no_trace() -> None:
    model, inputs, targets = make(CASES["batchnorm"])
    before = snapshot(model)
    regularizer = FisherTraceRegularizer(model, passes="compiled", num_sub_batches=4)
    with pytest.raises(KeyboardInterrupt):
        regularizer.backward(F.cross_entropy, inputs, targets)
    assert_same_bits(snapshot(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hvp_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="no second derivative: choose passes='together'"):
        FisherTraceRegularizer(mlp(), passes="compiled", estimator="hvp")


@needs_newer_compiler
@pytest.mark.usefixtures("backend")
def test_an_exception_in_the_loss_is_reported() -> None:
    with pytest.raises(FlatminimaError, match=r"must return a scalar tensor.*choose passes='one-by-one'"):
        FisherTraceRegularizer(mlp(), passes="compiled").backward(
            lambda o, y: F.cross_entropy(o, y, reduction="none"), torch.randn(24, 6), torch.zeros(24).long()
        )


def test_what_is_trained_outside_the_model_is_refused_where_it_would_get_no_main_gradient(backend: Any) -> None:
    model, inputs, targets = make(CASES["mlp"])
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    regularizer = FisherTraceRegularizer(model, main_gradient="sub-batches", passes="compiled")
    with pytest.raises(FlatminimaError, match=r"Tensor of shape \(3,\).*choose main_gradient='whole-batch'"):
        regularizer.backward(lambda output, y: F.cross_entropy(output + shift, y), inputs, targets)
