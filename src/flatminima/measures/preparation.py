"""What is done once for a model before its trials: checks, subsets, training loss, plan."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from flatminima.errors import naming, naming_errors, require
from flatminima.gramian import Checks, Plan, plan_for, trainable_parts, unwrapped
from flatminima.measures.evaluation import EVALUATION_BATCH, Evaluating, Evaluation
from flatminima.measures.fisher import FisherRows
from flatminima.measures.options import MeasureOptions
from flatminima.measures.plausibility import SAMPLES_LOOKED_AT, constant_outputs, refuse_random, warn_of_implausible
from flatminima.measures.registry import Selection, selected
from flatminima.measures.unchanged import UnchangedWeights
from flatminima.network import (
    Inputs,
    Samples,
    SamplesOfModel,
    call_model_without_graph,
    device_of,
    evaluating,
    explained_errors,
    index_batches,
    map_tensors,
    take,
    to_device,
    true_precision,
    undisturbed,
)
from flatminima.parallel import Processes, processes_of, shared, without_exchanges
from flatminima.progress import ProgressBar, track
from flatminima.sampling import draw_subsets
from flatminima.torch_compat import without_checkpoints


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready for its trials, with what all of them need; made by :func:`prepare`.

    Attributes:
        model: the model.
        samples: its training data.
        options: how it is measured.
        processes: those that its parameters are split over.
        num_parameters: W, trainable parameters of all processes together.
        subsets: every trial's samples, by index.
        rows: how samples become rows of J.
        train: loss and accuracy over all of its training data.
        plan: how ξ is formed within the memory budget.
        selection: the measures to be taken.
        constant_outputs: whether it returns the same for several samples.
        checks: what the trials have found out about its rows of J.
        values_of_weights: measures of the weights alone by name, which the first trial takes for all.
        weights: that users' own measures leave them as they are. These three grow.
    """

    model: nn.Module
    samples: Samples
    options: MeasureOptions
    processes: Processes
    num_parameters: int
    subsets: list[list[int]]
    rows: FisherRows
    train: Evaluation
    plan: Plan
    selection: Selection
    constant_outputs: bool
    checks: Checks
    values_of_weights: dict[str, float] = field(default_factory=dict)
    weights: UnchangedWeights = field(default_factory=UnchangedWeights)

    def batch(self, number: int) -> tuple[Inputs, Tensor]:
        """The samples of trial ``number`` on the model's device."""
        return _fetched(self.model, self.samples, self.subsets[number], self.processes)


def prepare(models: Mapping[str, nn.Module], samples: Samples, options: MeasureOptions) -> dict[str, PreparedModel]:
    """Check models and their data, evaluate the training losses in one pass of the data, and plan how ξ is formed.

    Raises and warns of what :func:`~flatminima.measure` does before its first trial; of several models it names them.
    """
    if len(models) > 1:
        samples = SharedSamples(samples)
    named = naming if len(models) > 1 else nullcontext
    of_model = {name: options.for_model(name, models) for name in models}
    planned, prepared = {}, {}
    for name, model in models.items():
        with named(name):
            planned[name] = _planned(model, samples, options)
    train = _training_losses(planned, options)
    for name, plan in planned.items():
        with named(name):
            prepared[name] = _prepared(plan, train[name], of_model[name])
    return prepared


@dataclass(frozen=True)
class _Planned:
    """What is known of a model before its training loss is; attributes as of :class:`PreparedModel`."""

    model: nn.Module
    samples: Samples
    processes: Processes
    num_parameters: int
    subsets: list[list[int]]
    rows: FisherRows
    plan: Plan
    first: tuple[Inputs, Tensor]
    """The samples of the first trial."""


def _planned(model: nn.Module, samples: Samples, options: MeasureOptions) -> _Planned:
    model = without_exchanges(model)
    processes = processes_of(unwrapped(model))
    require(
        processes.size == 1 or not options.distributed,
        "the processes that share a sharded model's parameters perform every trial together: "
        "leave distributed=True out",
    )
    processes.require_same("numbers of samples", lambda: len(samples))
    samples = SamplesOfModel(unwrapped(model), samples)
    num_parameters = sum(part.parameter.numel() for part in trainable_parts(unwrapped(model), processes).values())
    subsets = draw_subsets(len(samples), options.subset_size, options.trials, options.seed)
    inputs, targets = _fetched(model, samples, subsets[0], processes)
    rows = FisherRows.of(options.fisher, options.loss, model, inputs)
    _refuse_more_rows_than_parameters(rows, num_parameters, options)
    plan = plan_for(model, rows.of_batch(inputs, targets)[0], memory_budget=options.memory_budget)
    return _Planned(model, samples, processes, num_parameters, subsets, rows, plan, (inputs, targets))


def _training_losses(planned: Mapping[str, _Planned], options: MeasureOptions) -> dict[str, Evaluation]:
    """Of all models, batch by batch, so that a batch is fetched once."""
    batch = min(EVALUATION_BATCH, *(of_model.plan.affordable_samples for of_model in planned.values()))
    named = naming_errors if len(planned) > 1 else nullcontext
    evaluated = {name: Evaluating(one.model, one.samples, options.loss) for name, one in planned.items()}
    with ExitStack() as stack:
        for one in evaluated.values():
            stack.enter_context(one.running())
        size = len(next(iter(planned.values())).samples)
        for indices in track(index_batches(size, batch), "training loss", options.progress):
            for name, one in evaluated.items():
                with named(name):
                    one.add(indices)
    return {name: planned[name].processes.gather(one.result)[0] for name, one in evaluated.items()}


def _prepared(planned: _Planned, train: Evaluation, options: MeasureOptions) -> PreparedModel:
    model, (inputs, targets) = planned.model, planned.first
    several = min(SAMPLES_LOOKED_AT, planned.plan.chunk, options.subset_size)
    logits = _logits(model, inputs, several)
    refuse_random(logits, _logits(model, inputs, several))
    warn_of_implausible(options.loss, take(inputs, slice(several)), targets[:several], logits, train)
    if options.progress and len(planned.plan.passes) > 1:
        sys.stderr.write(f"plan: {planned.plan}\n")  # which bars make room for
    return PreparedModel(
        model,
        planned.samples,
        options,
        planned.processes,
        planned.num_parameters,
        planned.subsets,
        planned.rows,
        train,
        planned.plan,
        selected(options.measures),
        constant_outputs(logits),
        Checks(),
    )


class SharedSamples:
    """Samples that several models look at in turn: the same ones again are fetched once, and each model has its own."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._indices: Sequence[int] | None = None
        self._batch: tuple[Inputs, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """As of the samples."""
        if self._batch is None or indices != self._indices:
            self._batch = None  # before there is another, lest memory hold both
            self._batch, self._indices = self._samples.fetch(indices), indices
        inputs, targets = self._batch
        return map_tensors(Tensor.clone, inputs), targets.clone()


def preparing(options: MeasureOptions) -> ProgressBar:
    """What is shown where no other bar is."""
    return ProgressBar("preparing", None, enabled=options.progress)


@contextmanager
def processes_together(models: Iterable[nn.Module], options: MeasureOptions) -> Iterator[None]:
    """:meth:`Processes.together`, for the processes that split the trials, or those that share a model's parameters."""
    with ExitStack() as stack:
        if options.distributed:
            stack.enter_context(Processes.all().together())
        inner = [unwrapped(model) for model in models]
        stack.enter_context(undisturbed(*inner))
        stack.enter_context(without_checkpoints())
        for model in inner:
            stack.enter_context(shared(model))
        yield


def _fetched(model: nn.Module, samples: Samples, indices: list[int], processes: Processes) -> tuple[Inputs, Tensor]:
    return to_device(processes.attempt(lambda: samples.fetch(indices)), device_of(model))


def _logits(model: nn.Module, inputs: Inputs, samples: int) -> Tensor:
    """Those of the first samples."""
    with evaluating(model), true_precision(), explained_errors(model, inputs):
        return call_model_without_graph(model, take(inputs, slice(samples)))


def _refuse_more_rows_than_parameters(rows: FisherRows, num_parameters: int, options: MeasureOptions) -> None:
    size, per_sample = options.subset_size, rows.per_sample
    times = "" if per_sample == 1 else f" times {per_sample} rows per sample (fisher={options.fisher!r})"
    require(
        size * per_sample <= num_parameters,
        f"subset_size={size}{times} exceeds the model's {num_parameters} trainable parameters, "
        f"so every ξ is singular: lower subset_size to at most {num_parameters // per_sample}",
    )
