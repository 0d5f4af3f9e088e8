"""What a measure may look at: one subset of the training data, and what is known of the model on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flatminima.errors import UndefinedMeasureError
from flatminima.gramian import FactoredGram, LogDeterminant, trainable_parameters
from flatminima.losses import Loss
from flatminima.measures.evaluation import Evaluation
from flatminima.measures.weight_products import WeightProducts
from flatminima.network import Inputs, call_model_without_graph, in_float64, take

if TYPE_CHECKING:  # options name measures, which are functions of a trial
    from flatminima.measures.options import MeasureOptions


@dataclass(frozen=True)
class Trial:
    """One trial, as measures see it. The model is in eval mode, and its weights must be left as they are.

    Attributes:
        number: of the trial, from 0.
        model: the model, out of what compiles it or splits its batch; derivatives are being recorded.
        inputs: the subset's inputs on the model's device, N' of them.
        targets: its targets.
        gram: ξ of the subset in factored form, with the samples' losses.
        log_det: ln det ξ and its parts; None where ξ is singular, and that is to be skipped.
        rows_per_sample: of J: 1, or K − 1 for the exact Fisher information. Rows of one sample are neighbours.
        train: loss and accuracy over all of the training data.
        num_samples: N, the size of the training data.
        initial: the weights that training began with by name, where they were given.
        options: how the minimum is measured.
        form: gives ξ of the subset with other options of ``factored_gram``; it takes as long as ξ itself.
        samples_at_once: as many as memory holds a forward and backward pass of.
        sharded: whether the model's parameters are split over processes, so that none has them whole.
    """

    number: int
    model: nn.Module
    inputs: Inputs
    targets: Tensor
    gram: FactoredGram
    log_det: LogDeterminant | None
    rows_per_sample: int
    train: Evaluation
    num_samples: int
    initial: Mapping[str, Tensor] | None
    options: MeasureOptions
    form: Callable[..., FactoredGram]
    samples_at_once: int
    sharded: bool = False

    @property
    def loss(self) -> Loss:
        """The loss that is measured."""
        return self.options.loss

    @property
    def losses(self) -> Tensor:
        """(N',) float64: the samples' losses."""
        return self.gram.loss[:: self.rows_per_sample]

    @property
    def num_rows(self) -> int:
        """Of J: N' times ``rows_per_sample``."""
        return len(self.gram.unit)

    @cached_property
    def xi(self) -> Tensor:
        """ξ = JJᵀ, (rows, rows) float64; entries below 1e-308 underflow to zero."""
        return self.gram.matrix()

    @cached_property
    def spectrum(self) -> Tensor:
        """The eigenvalues of ξ in descending order, float64, on the CPU."""
        ascending: Tensor = torch.linalg.eigvalsh(self.xi)
        return ascending.flip(0).clamp_min(0).cpu()

    @cached_property
    def correlation(self) -> Tensor:
        """(rows, rows) float64: cosines of the rows of J; NaN for a row of zeros."""
        return self.gram.correlation()

    @cached_property
    def sample_blocks(self) -> Tensor:
        """(rows_per_sample, rows_per_sample, N') float64: the samples' own blocks of ξ."""
        samples, per_sample = len(self.targets), self.rows_per_sample
        return self.xi.view(samples, per_sample, samples, per_sample).diagonal(dim1=0, dim2=2)

    @cached_property
    def adaptive_gram(self) -> FactoredGram:
        """The Gram matrix of J diag(|w|) in factored form: ``gram`` itself where gradients are scale-invariant."""
        return self.gram if self.options.scale_invariant else self.form(scale_invariant=True)

    @property
    def size(self) -> int:
        """N', samples that the loss is the mean of."""
        return len(self.targets)

    def parts(self) -> Iterator[tuple[Inputs, Tensor]]:
        """The subset's samples, as many at a time as memory holds a forward and backward pass of."""
        for part in self.chunks:
            yield take(self.inputs, part), self.targets[part]

    @property
    def chunks(self) -> list[slice]:
        """The samples of one pass after the other, as many in each as fit the memory budget."""
        samples, step = len(self.targets), self.samples_at_once
        return [slice(start, min(start + step, samples)) for start in range(0, samples, step)]

    @cached_property
    def unit_weight_products(self) -> Tensor:
        """(N',) float64: h_i·w, the products of ‖δ_i‖⁻¹ g_i with the trainable weights w.

        g_i·w is ``exp(gram.log_scale)`` times that.

        Raises:
            UndefinedMeasureError: for an exact Fisher information, batch statistics and sharded models.
        """
        self.require_gradients_of_samples()
        products = WeightProducts(
            self.model,
            list(self.parameters.values()),
            self.inputs,
            self.targets,
            self.loss,
            self.options.logit_normalization,
        )
        return products.at_unit_residuals(self.chunks).to(self.gram.log_scale.device)

    @cached_property
    def class_logits(self) -> Tensor:
        """(N', K) float64: the logits, at the cost of a forward pass.

        Raises:
            UndefinedMeasureError: for outputs or targets that are not of one class per sample.
        """
        self.require_classes()
        logits = [in_float64(call_model_without_graph(self.model, take(self.inputs, rows))) for rows in self.chunks]
        return torch.cat(logits)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name.

        Raises:
            UndefinedMeasureError: for a sharded model.
        """
        self.require_whole_weights()
        return trainable_parameters(self.model)

    def require_whole_weights(self) -> None:
        """Go on only where this process has every parameter whole.

        Raises:
            UndefinedMeasureError: for a sharded model.
        """
        if self.sharded:
            raise UndefinedMeasureError("it needs the weights whole, and the model's are split over processes")

    def require_labels(self) -> None:
        """Go on only where a target is a class.

        Raises:
            UndefinedMeasureError: for targets of another kind.
        """
        if self.targets.dim() != 1 or self.targets.is_floating_point():
            raise UndefinedMeasureError("the targets are not one class per sample")

    def require_classes(self) -> int:
        """Go on only where a sample has K logits and one class, which a forward pass of one sample shows.

        Returns:
            K.

        Raises:
            UndefinedMeasureError: for outputs or targets of another kind.
        """
        shape = call_model_without_graph(self.model, take(self.inputs, slice(1))).shape
        if len(shape) != 2 or shape[1] < 2:
            named = ", ".join(["N", *map(str, shape[1:])])
            raise UndefinedMeasureError(f"outputs of shape ({named}) are no logits of one class per sample")
        self.require_labels()
        return shape[1]

    def require_gradients_of_samples(self) -> None:
        """Go on only where a row of J is a sample's own loss gradient.

        Raises:
            UndefinedMeasureError: for an exact Fisher information, and for batch statistics.
        """
        if self.options.fisher != "empirical":  # of two classes, an exact one has a single row as well
            raise UndefinedMeasureError("it is one of samples' own gradients: use fisher='empirical'")
        self.require_own_statistics()

    def require_own_statistics(self) -> None:
        """Go on only where a sample's gradient depends on that sample alone.

        Raises:
            UndefinedMeasureError: for batch statistics.
        """
        if self.options.batchnorm != "eval":
            raise UndefinedMeasureError("with batch statistics a gradient is not one sample's: use batchnorm='eval'")

    def generator(self) -> torch.Generator:
        """A new generator on the CPU that draws the same for this trial every time, whatever was measured before."""
        return torch.Generator("cpu").manual_seed((1_000_003 * self.options.seed + self.number) % 2**64)
