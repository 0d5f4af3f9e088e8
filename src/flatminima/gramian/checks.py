"""Rows of J held against plain autograd: those of all samples together, and those of two samples alone.

For weights c_i, cᵀξ_p c = ‖Σ_i c_i ∇_p ℓ_i‖², and the right side is one plain backward pass of the weighted losses. For
random weights the two agree for every parameter p only if ξ_p is right. That sees rows that were given to the wrong
sample, and samples that interact. Two samples are run alone besides: what the batch does to a sample in *both* kinds of
pass is seen there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatminima.errors import WrongGradientError
from flatminima.gramian.accumulator import Accumulator
from flatminima.gramian.autograd import Batch, add_gradients, gradient_of, groups
from flatminima.gramian.parts import Part, common_dtype
from flatminima.losses import LogitGradient
from flatminima.network import back_like, in_float64, rounded_otherwise
from flatminima.parallel import Processes

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
"""Allowed difference from plain autograd, relative to the gradients' norms.

Wide enough for float64 models that normalize in float32; rows that are wrong differ by far more."""

ROUNDING = 1e-3
"""Largest relative change of what modules are given that stands for rounding, as a part of the tolerance."""

OTHER_ROUNDINGS = 8
"""How often a sample whose gradient differs is run alone with other roundings; each falls on either side of a kink."""

SAME_LOSS = 1e-4
"""Allowed relative difference between a sample's losses in batches of different size, for the same float64 logits."""


@dataclass
class Checks:
    """What is known of one model's rows of J, over a series of ξ.

    Attributes:
        passed: the sequences of calls and shapes whose rows were right.
        distrusted: the parameters whose rows by layer rules were wrong; they take the generic path from then on.
        looked_at: the parameters without any gradient that were looked at, and warned of if need be.
    """

    passed: set[tuple[int, ...]] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    looked_at: set[str] = field(default_factory=set)


class Reference:
    """Plain autograd on the whole batch, for one ξ.

    Raises:
        WrongGradientError: if the loss of a sample depends on the others, or the model's output for it does.
    """

    def __init__(self, xi: Accumulator, batch: Batch, parts: Mapping[str, Part], chunk: int) -> None:
        self.batch, self.parts, self.chunk = batch, parts, chunk
        self.tolerance = TOLERANCE[common_dtype(parts)]
        self.samples = sorted({0, len(xi) - 1})
        self.logits: dict[int, Tensor] = {}
        self.directions: dict[int, Tensor] = {}
        self.squares = self._squares(xi)
        self._compare_outputs()

    def _squares(self, xi: Accumulator) -> Tensor:
        """‖Σ_i c_i ∇_p ℓ_i‖² for every part, by one plain backward pass of the batch, chunk by chunk."""
        squares = torch.zeros(len(self.parts), dtype=torch.float64, device=xi.unit.device)
        numbers = {id(part.parameter): i for i, part in enumerate(self.parts.values())}
        for number, group in enumerate(groups(self.parts.values(), 1)):
            totals: list[Tensor] = []
            for start in range(0, len(xi), self.chunk):
                rows = slice(start, min(start + self.chunk, len(xi)))
                logits = self.batch.logits(rows)
                delta = self.batch.gradient_at(logits, rows)
                if number == 0 and len(self.logits) < len(self.samples):
                    self._look_at(logits.detach(), delta, rows)
                weights = back_like(xi.weights[rows], logits).view(-1, *[1] * (logits.dim() - 1))
                gradients = gradient_of(logits, delta.direction * weights, group)
                totals = [total.add_(g) for total, g in zip(totals, gradients, strict=True)] if totals else gradients
                del logits, delta, gradients
            for (parameter, start, stop), total in zip(group, totals, strict=True):
                if xi.scale_invariant:
                    part = self.parts[xi.names[id(parameter)]]
                    total = total * part.values[start - part.start : stop - part.start].abs()
                squares[numbers[id(parameter)]] += in_float64(total).square().sum().to(squares.device)
        return squares

    def _look_at(self, logits: Tensor, delta: LogitGradient, rows: slice) -> None:
        """Keep what the samples that are run alone need of the batch; refuse a loss that depends on its batch."""
        for i in self.samples:
            if rows.start <= i < rows.stop:
                self.logits[i] = logits[i - rows.start : i - rows.start + 1].clone()
                self.directions[i] = delta.direction[i - rows.start : i - rows.start + 1].clone()
        middle = (len(logits) + 1) // 2
        for part in (slice(0, middle), slice(middle, len(logits))) if len(logits) > 1 else ():
            of_part = self.batch.gradient_at(logits[part], slice(rows.start + part.start, rows.start + part.stop))
            pairs = ((of_part.loss, delta.loss[part]), (of_part.log_norm, delta.log_norm[part]))
            if not all(torch.allclose(a, b, rtol=SAME_LOSS, atol=1e-8) for a, b in pairs):
                raise WrongGradientError(
                    "the loss gives a sample another value in another batch (divided by something of the batch?): "
                    "return a loss that depends on the sample alone"
                )

    def _compare_outputs(self) -> None:
        for i, expected in self.logits.items():
            alone = self.batch.logits(slice(i, i + 1)).detach()
            error = (alone - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
            if not error <= self.tolerance:
                raise WrongGradientError(
                    f"the model's output for sample {i} is another in the batch than alone by {error.item():.1e} "
                    f"(relative, allowed {self.tolerance:.0e}): samples interact, or it is random in eval mode too, "
                    "or its first dimension is not the samples"
                )

    def wrong_parameters(self, xi: Accumulator, processes: Processes, generic: Collection[str]) -> list[str]:
        """Parameters whose rows differ from the batch's gradient; those by plain autograd have more room for rounding.

        The rows of those were formed one sample at a time, so that rounding can put them on other sides of kinks than
        the batch (:meth:`compare_samples_alone`): they are held against it with other roundings as well.

        Every process gives the same answer.
        """
        wrong = self._wrong(xi, self.squares, processes, generic)
        for attempt in range(OTHER_ROUNDINGS):
            if wrong.isdisjoint(generic):
                break
            with self._rounded_otherwise(attempt):
                squares = self._squares(xi)
            wrong -= set(generic) - self._wrong(xi, squares, processes, generic)
        return [name for name in self.parts if name in wrong]

    def _wrong(self, xi: Accumulator, squares: Tensor, processes: Processes, generic: Collection[str]) -> set[str]:
        sums = torch.stack([*xi.forms.T, squares])
        processes.add_up(sums)
        form, scale, square = sums
        room = self.tolerance * (scale + square)
        room = room + self.tolerance**2 * (scale + square).sum()  # gradients that are zero but for rounding
        names = list(self.parts)
        factor = torch.tensor(
            [10.0 if name in generic else 1.0 for name in names], dtype=room.dtype, device=room.device
        )
        right = (form - square).abs() <= factor * room
        return {name for name, ok in zip(names, right.tolist(), strict=True) if not ok}

    def _rounded_otherwise(self, attempt: int) -> AbstractContextManager[None]:
        return rounded_otherwise(self.batch.model, ROUNDING * self.tolerance, attempt)

    def compare_samples_alone(self, xi: Accumulator, processes: Processes) -> None:
        """Compare the entries of the first and the last sample with plain autograd on each alone.

        Where a unit's input is zero but for rounding, the batch and the sample alone can be on different sides of its
        kink (ReLU's, say), and their gradients differ by far more than rounding. So what differs is held against the
        sample alone with other roundings as well: on one side of the kink or the other, one that does not interact
        agrees.
        """
        difference = self._difference_alone(xi, processes)
        for attempt in range(OTHER_ROUNDINGS):
            if difference.max() <= self.tolerance:
                return
            with self._rounded_otherwise(attempt):
                difference = difference.fmin(self._difference_alone(xi, processes))
        if not difference.max() <= self.tolerance:
            raise WrongGradientError(
                f"gradients of samples {self.samples} in the batch differ from plain autograd on each alone by "
                f"{difference.max().item():.1e} (relative, allowed {self.tolerance:.0e}): samples interact"
            )

    def _difference_alone(self, xi: Accumulator, processes: Processes) -> Tensor:
        """Of the entries of ξ for the samples that are run alone, relative to the norms of their gradients."""
        samples = self.samples
        expected = Accumulator(len(samples), self.parts, scale_invariant=xi.scale_invariant, shares=False)
        for group in groups(self.parts.values(), len(samples)):
            gradients = [gradient_of(self.batch.logits(slice(i, i + 1)), self.directions[i], group) for i in samples]
            add_gradients(expected, group, gradients)
        expected.add_up(processes)
        norms = expected.unit.diagonal().sqrt()
        difference = (xi.unit[samples][:, samples] - expected.unit).abs()
        return difference / (norms[:, None] * norms).clamp_min(1e-300)
