"""A model, a loss and N' samples → ξ = JJᵀ, one parameter at a time. J itself never exists.

ξ is additive over parameters, ξ = Σ_p J_p J_pᵀ, so one forward and one backward pass are enough: the forward pass
records every use of every trainable parameter (:mod:`~flatminima.gramian.recording`), and the backward pass, which
computes gradients of activations only, hands each use its output gradient, forms that parameter's rows, adds their
product to ξ (:mod:`~flatminima.gramian.accumulator`) and frees them. Parameters without a layer rule are differentiated
one sample at a time instead (:mod:`~flatminima.gramian.autograd`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from flatminima.errors import GenericPathWarning, WrongGradientError, require, warn
from flatminima.gramian.accumulator import Accumulator, ChunkedRows, slice_length
from flatminima.gramian.autograd import (
    Batch,
    add_one_by_one,
    add_with_batch_statistics,
    note_losses,
    used_parameters,
)
from flatminima.gramian.checks import Checks, Reference
from flatminima.gramian.factored import FactoredGram
from flatminima.gramian.memory import default_budget
from flatminima.gramian.parts import Part, common_dtype, trainable_parts
from flatminima.gramian.planning import (
    Plan,
    first_dimension,
    make_plan,
    pass_bytes,
    row_bytes,
)
from flatminima.gramian.recording import DerivativeInForwardError, RecordedUse, Recorder
from flatminima.losses import FactoredLoss, Loss, refuse_non_finite
from flatminima.network import (
    Inputs,
    batch_size,
    chunk_statistics,
    device_of,
    differentiating,
    evaluating,
    frozen,
    in_float64,
    listed,
    map_tensors,
    model_inputs,
    refusing_kept_graphs,
    require_module,
    take,
    tensors_of,
    true_precision,
    undisturbed,
    undone_if_interrupted,
    warn_unused,
)
from flatminima.parallel import Processes, reshard, shared
from flatminima.torch_compat import uncompiled, without_checkpoints

PathName = Literal["rules", "generic"]
"""How rows of J are formed: by layer rules where there are any, or all by plain autograd, one sample at a time."""


@undone_if_interrupted
def gram(
    model: nn.Module, inputs: Inputs, targets: Tensor, *, loss: Loss = "cross_entropy", path: PathName = "rules"
) -> Tensor:
    """ξ = JJᵀ, the Gram matrix of per-sample loss gradients over all trainable parameters (Jia & Su, Eq. 4–5).

    The model is run in eval mode (BatchNorm by its running statistics, no dropout) and left as it was found.

    Args:
        model: any module; its output is the logits, or an object with ``.logits``. Sharded by FSDP2 (``fully_shard``),
            it is called by all its processes with the same samples; each forms the rows of its own shards, and beside
            what FSDP2 gathers for every pass they exchange the weights once more and the N'×N' sum. An error on one is
            raised on all.
        inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``) of tensors with N' rows.
        targets: (N',) class indices for the cross entropy; whatever ``loss`` takes otherwise.
        loss: ``"cross_entropy"``, or ``loss(logits, targets)`` → (N',) tensor of per-sample losses.
        path: ``"rules"``, or ``"generic"`` for plain autograd, one sample at a time: slow, and without layer rules.

    Returns:
        (N', N') float64: entry i, j is the inner product of the loss gradients of samples i and j.

    Raises:
        NonFiniteError: for NaN or infinity in weights, logits or losses.
        WrongGradientError: if a check against plain autograd fails also for gradients formed one sample at a time
            (samples interact within the batch).
        FlatminimaError: for inputs, targets or a loss of the wrong kind, or no trainable parameter.

    Example:
        >>> import torch, flatminima
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> flatminima.gram(model, x, y).shape
        torch.Size([5, 5])
    """
    checks = Checks()
    result = factored_gram(model, inputs, targets, loss=loss, path=path, checks=checks)
    if path == "rules":
        warn_generic(result.generic_parameters, checks)
    return result.matrix()


def factored_gram(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    loss: Loss | FactoredLoss = "cross_entropy",
    logit_normalization: float | None = None,
    batchnorm: Literal["eval"] | int = "eval",
    scale_invariant: bool = False,
    shares: bool = False,
    plan: Plan | None = None,
    path: PathName = "rules",
    spot_check: bool = True,
    checks: Checks | None = None,
) -> FactoredGram:
    """ξ in factored form. Arguments and errors as for :func:`gram`, and beside them those below.

    Args:
        model: as for :func:`gram`.
        inputs: as for :func:`gram`.
        targets: as for :func:`gram`.
        loss: as for :func:`gram`.
        logit_normalization: see :func:`flatminima.losses.logit_gradient`.
        batchnorm: ``"eval"`` or a number n: BatchNorm then normalizes by the statistics of consecutive chunks of n
            samples, on which a sample's gradient then depends (the authors' release: 10). Costs n backward passes.
        scale_invariant: weight the columns of J by the parameters' magnitudes.
        shares: keep every parameter's part of ξ̂.
        plan: from :func:`plan_for` (default: made here, for half of the free memory).
        path: as for :func:`gram`.
        spot_check: hold the rows against plain autograd (:mod:`~flatminima.gramian.checks`). Parameters whose rows by
            layer rules are wrong take the generic path, with a :class:`GenericPathWarning`.
        checks: what is known from earlier ξ of this model; what was checked before is not checked again.
    """
    model = unwrapped(model)
    require_path(path)
    require(
        isinstance(targets, Tensor),
        f"targets must be a tensor, got {type(targets).__name__}: convert them",
    )
    require(targets.dim() > 0, "the targets are a single number: pass one for every sample, in the first dimension")
    require(len(targets) > 0, "there are no samples: pass at least one")
    with undisturbed(model), shared(model) as processes:
        inputs = model_inputs(model, map_tensors(torch.Tensor.detach, inputs), targets)
        n = batch_size((inputs, targets))
        plan = plan or plan_for(model, inputs)
        processes.require_same("samples", lambda: _sums((inputs, targets)))
        parts = trainable_parts(model, processes)
        dtype = common_dtype(parts)
        checks = checks or Checks()
        batch = Batch(model, inputs, targets, loss, logit_normalization)

        def empty() -> Accumulator:
            return Accumulator(n, parts, scale_invariant=scale_invariant, shares=shares)

        with differentiating(model), refusing_kept_graphs(model):
            if isinstance(batchnorm, int):
                generic: set[str] = set()
                xi = empty()
                with chunk_statistics(model):
                    add_with_batch_statistics(xi, batch, parts, batchnorm)
                xi.add_up(processes)
                refuse_non_finite("gradients", xi.unit)
                if spot_check:
                    _look_at_unused(xi, batch, parts, batchnorm, processes, checks)
            else:
                one_by_one = set(parts) if path == "generic" else checks.distrusted & set(parts)
                xi, generic = _checked(empty, batch, parts, plan, one_by_one, processes, checks if spot_check else None)
        names = tuple(name for name in parts if name in generic)
        return FactoredGram(xi.unit, xi.log_scale, xi.loss, names, dtype, xi.shares)


def plan_for(model: nn.Module, inputs: Inputs, *, memory_budget: int | None = None) -> Plan:
    """How ξ of these samples would be formed within a memory budget. Costs one forward pass of one sample.

    Args:
        model: as for :func:`gram`.
        inputs: as for :func:`gram`.
        memory_budget: bytes (default: half of what is free on the model's device).

    Raises:
        FlatminimaError: if the budget is too small for one sample and one slice of a parameter.
    """
    model = unwrapped(model)
    budget = default_budget(device_of(model)) if memory_budget is None else memory_budget
    with undisturbed(model), shared(model) as processes, evaluating(model), true_precision(), without_checkpoints():
        parts = trainable_parts(model, processes)
        budget = min(processes.gather(lambda: budget))  # one plan for all, as they run the model together
        per_sample = pass_bytes(model, take(inputs, slice(0, 1)))
    reshard(model)  # FSDP2 keeps the outermost module's parameters gathered after a forward pass
    n, longest = batch_size(inputs), {name: part.longest_shape() for name, part in parts.items()}
    rows = {name: n * row_bytes(shape) for name, shape in longest.items()}
    held = max(
        row * min(first_dimension(longest[name]), slice_length(row, device_of(model))) for name, row in rows.items()
    )
    return make_plan(n, longest, per_sample, held, budget)


def require_path(path: str) -> None:
    """Raise :class:`FlatminimaError` unless ``path`` is a :data:`PathName`."""
    require(path in get_args(PathName), f"unknown path={path!r}: use 'rules' or 'generic'")


def warn_generic(names: Sequence[str], checks: Checks) -> None:
    """Say by a :class:`GenericPathWarning` which parameters had no layer rule, if any.

    Those whose rule was found to be wrong have been warned of then.
    """
    names = [name for name in names if name not in checks.distrusted]
    if names:
        warn(
            f"{listed(names)} are used in a way no layer rule covers: "
            "their gradients were formed one sample at a time, which is exact but slower",
            GenericPathWarning,
        )


def _checked(
    empty: Callable[[], Accumulator],
    batch: Batch,
    parts: Mapping[str, Part],
    plan: Plan,
    one_by_one: set[str],
    processes: Processes,
    checks: Checks | None,
) -> tuple[Accumulator, set[str]]:
    """ξ̂, held against plain autograd where ``checks`` are given, and the parameters that took the generic path.

    Rows by layer rules that are wrong are formed once more, one sample at a time.
    """
    reference: Reference | None = None
    while True:
        xi = empty()
        recorded = _Recorded()
        by_rules = {name: part for name, part in parts.items() if name not in one_by_one}
        if by_rules:
            try:
                _add_by_rules(xi, batch, by_rules, plan, recorded)
            except DerivativeInForwardError:
                one_by_one = set(parts)
                continue
        else:
            note_losses(xi, batch, plan.chunk)
        generic = one_by_one | set(recorded.given_up)
        if recorded.unseen:
            generic |= used_parameters(batch, recorded.unseen, plan.chunk)
        add_one_by_one(xi, batch, {name: part for name, part in parts.items() if name in generic})
        xi.add_up(processes)
        refuse_non_finite("gradients", xi.unit)
        signature = (*recorded.signatures, *sorted(map(hash, generic)))
        if checks is None or (signature in checks.passed and not recorded.guessed):
            return xi, generic
        reference = reference or Reference(xi, batch, parts, plan.chunk)
        wrong = reference.wrong_parameters(xi, processes, generic)
        if not wrong:
            reference.compare_samples_alone(xi, processes)
            _look_at_unused(xi, batch, parts, plan.chunk, processes, checks)
            checks.passed.add(signature)
            return xi, generic
        if not generic.isdisjoint(wrong):
            raise WrongGradientError(
                f"gradients of {listed(wrong)} in the batch differ from those of its samples one at a time: "
                "samples interact, or are not the model's first dimension throughout"
            )
        warn(
            f"what layer rules gave for {listed(wrong)} differs from plain autograd: "
            "their gradients are formed one sample at a time, which is exact but slower",
            GenericPathWarning,
        )
        checks.distrusted.update(wrong)
        one_by_one = one_by_one | set(wrong)


def _look_at_unused(
    xi: Accumulator, batch: Batch, parts: Mapping[str, Part], chunk: int, processes: Processes, checks: Checks
) -> None:
    """Warn of parameters that no sample's logits depend on, unless training's do not either; of each once."""
    if processes.size > 1:  # each would have to copy the model, and its shards
        return
    new = {name: parts[name].parameter for name in xi.without_rows() if name not in checks.looked_at}
    checks.looked_at.update(new)
    if new:
        unused = new.keys() - used_parameters(batch, new, chunk)
        warn_unused(batch.model, take(batch.inputs, slice(0, chunk)), unused)


@dataclass
class _Recorded:
    """What the forward passes showed.

    Attributes:
        given_up: parameters with a use that no rule covers.
        unseen: parameters that no call of some pass showed.
        seen: parameters that a call of some pass showed.
        signatures: of the sequence of calls and shapes of every pass.
        guessed: whether it was only likely, somewhere, where the samples lie.
    """

    given_up: dict[str, nn.Parameter] = field(default_factory=dict)
    unseen: dict[str, nn.Parameter] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    signatures: list[int] = field(default_factory=list)
    guessed: bool = False

    def add(self, recorder: Recorder) -> None:
        """Take note of one forward pass."""
        self.given_up |= recorder.given_up_parameters()
        unseen = recorder.unseen_parameters()
        self.unseen |= unseen
        self.seen |= recorder.parameters.keys() - unseen.keys()
        self.signatures.append(recorder.signature)
        self.guessed |= recorder.guessed

    def give_up_partly_unseen(self) -> None:
        """Parameters that some samples use, or seem to, and others do not: where not all samples went in one pass."""
        self.given_up |= {name: parameter for name, parameter in self.unseen.items() if name in self.seen}


def _add_by_rules(xi: Accumulator, batch: Batch, parts: Mapping[str, Part], plan: Plan, recorded: _Recorded) -> None:
    """Add JJᵀ of every parameter that rules cover."""
    with frozen([p for p in batch.model.parameters() if p.requires_grad]):
        for planned in plan.passes:
            pieces = [piece for piece in planned if piece.name in parts]
            if not pieces:
                continue
            wanted = {piece.name: parts[piece.name].parameter for piece in pieces}
            sink: Accumulator | ChunkedRows = xi if plan.at_once else ChunkedRows(plan.samples, pieces, parts)
            for start in range(0, plan.samples, plan.chunk):
                rows = slice(start, min(start + plan.chunk, plan.samples))
                recorder = Recorder(rows.stop - start, wanted)
                logits = recorder.run(batch.model, take(batch.inputs, rows))
                delta = batch.gradient_at(logits, rows)
                xi.note(rows, delta)
                recorded.add(recorder)
                if isinstance(sink, ChunkedRows):
                    sink.samples = rows
                _backward(logits, delta.direction, recorder, sink)
                del logits, delta, recorder
            recorded.give_up_partly_unseen()
            if isinstance(sink, ChunkedRows):
                sink.add_to(xi, {id(p) for p in recorded.given_up.values()})
    reshard(batch.model)  # else what FSDP2 still holds gathered would stay frozen
    recorded.unseen = {name: p for name, p in recorded.unseen.items() if name not in recorded.given_up}


def _backward(logits: Tensor, direction: Tensor, recorder: Recorder, sink: Accumulator | ChunkedRows) -> None:
    """Back-propagate ``direction`` through activations only; hand every covered parameter's uses to ``sink``."""

    def add_when_complete(parameter: nn.Parameter, uses: list[RecordedUse]) -> Callable[[], None]:
        def on_arrival() -> None:
            if all(use.grad is not None for use in uses):
                sink.add_use(parameter, uses)
                for use in uses:  # the graph's hooks keep them alive, and would keep activations and gradients too
                    del use.grad, use.use
                uses.clear()

        return on_arrival

    covered = list(recorder.covered_uses())
    for parameter, uses in covered:
        for use in uses:
            use.on_arrival = add_when_complete(parameter, uses)
    if logits.requires_grad:
        leaves = [leaf for leaf in recorder.leaves.values() if leaf.requires_grad]  # FSDP2's own no longer may
        torch.autograd.grad(logits, [recorder.root, *leaves], direction, allow_unused=True)
    for parameter, uses in covered:  # what is left has a use on a branch that no gradient reaches
        sink.add_use(parameter, uses)


def _sums(batch: tuple[Inputs, Tensor]) -> list[list[float]]:
    """What tells batches apart: the sum of every sample's values, for each tensor."""
    return [in_float64(tensor).reshape(len(tensor), -1).sum(1).tolist() for tensor in tensors_of(batch)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a compiled or data-parallel one: the wrappers hide its calls, or split its batch."""
    require_module(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    inner = uncompiled(model)
    return model if inner is model else unwrapped(inner)
