"""Train towards minima with a smaller Fisher trace (Jia & Su, Sec. 6, Algorithm 1).

The penalty on a mini-batch B, split at random into M sub-batches B_i with gradients g_i = ∇L(B_i, w), is (Eq. 6)

    R_α(w) = (1/M) Σ_i [L(B_i, w) − L(B_i, w − α g_i)]  ≈  α · mean_i ‖g_i‖²,

and no derivative passes through g_i, so its gradient is a finite difference of sub-batch gradients:

    ∇R_α(w) = (1/M) Σ_i [∇L(B_i, w) − ∇L(B_i, w − α g_i)]  →  α · mean_i H_i g_i  as α → 0 (smooth networks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn

from flatminima.choices import Estimator, MainGradient
from flatminima.errors import require, require_integer, require_number, require_positive
from flatminima.network import BatchStatistics, Before, Inputs, device_of, outside_autocast, require_usable, run_model
from flatminima.regularizer.distributed import (
    average_gradients,
    exchange,
    gathered_weights,
    in_place_of_main_forward,
    refuse_other_sharding,
)
from flatminima.regularizer.gradients import Gradients, GradientsLeft, norm_of
from flatminima.regularizer.passes import PassesName, passes_for
from flatminima.regularizer.penalty import Penalty, PenaltySettings, require_finite
from flatminima.regularizer.steps import PenaltyWatch, RegularizerStep, Rounding, shares_of
from flatminima.regularizer.sub_batches import (
    NOT_DIFFERENTIABLE,
    Closure,
    Weights,
    refuse_accumulation_hooks,
    scalar_loss,
    size_of,
)

LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(model_output, targets)`` → scalar, a mean over the samples (``reduction="mean"``)."""


class FisherTraceRegularizer:
    """Algorithm 1 (Jia & Su, Sec. 6): takes the place of ``loss.backward()`` in a training loop, for any optimizer.

    One step splits its batch at random into M sub-batches, which cost 2M sub-batch passes beside the ordinary one:
    about three times the arithmetic of a plain step, or two times with ``main_gradient="sub-batches"``. On small
    networks 2M passes take far longer than their arithmetic: see ``passes``.

    The penalty's passes run in float32, whatever the main pass uses, on copies of the buffers, and both passes of a
    sub-batch see one dropout mask. Weights are back to the same bits after every step, also when ``loss_fn`` raises.
    Optimizers that evaluate a closure several times a step (LBFGS) may call ``backward`` in it; every evaluation draws
    sub-batches of its own and counts as a step in ``every``, ``start_step`` and ``warmup_steps``.
    Models may be compiled, in ``DistributedDataParallel`` or under FSDP2 (``fully_shard``); compile the model, not the
    training step. ``docs/ideas/regularizer.md`` has all of this at length.

    Args:
        model: the network; its trainable parameters are float32 or float64.
        alpha: α, the step of the finite difference, > 0.
        beta: β, the penalty's weight, ≥ 0. The paper searches 10 to 125.
        num_sub_batches: M ≥ 1. The paper searches 4, 8 and 16.
        max_grad_norm: τ, the global norm to which ``.grad`` is clipped, or None. The paper searches 1 to 15.
        estimator: ``"finite-difference"`` is the paper's ∇R_α, ``"hvp"`` its limit α · mean_i H_i g_i, exact, and needs
            second derivatives of all operations. Across ReLU's kinks the two differ.
        main_gradient: ``"whole-batch"`` is a pass of its own over B. ``"sub-batches"``, the mean of the g_i, saves it,
            for losses that are means over independent samples; it is float32, BatchNorm normalizes sub-batches, and
            whatever is trained beside the model is refused.
        batch_statistics: what BatchNorm in training mode normalizes with in penalty passes: ``"sub-batch"`` the
            sub-batch's own statistics (the paper), ``"whole-batch"`` those of B at w, for one more forward pass,
            ``"running"`` the running ones.
        passes: ``"one-by-one"`` runs 2M small passes. ``"together"`` runs two by ``torch.func.vmap``, for devices that
            small passes starve and for small networks (on a CPU: of ten milliseconds a plain step or less), and
            ``"compiled"`` has ``torch.compile`` make one graph of these. Both need memory for some six tensors of M
            times the weights' size; what they cannot run they refuse.
        parameters: the parameters whose Fisher trace is penalized (default: all). The penalty's gradient goes to all
            trainable ones.
        every: k ≥ 1; the penalty acts on every k-th step, with weight k β; the steps between are plain steps. What is
            kept of the effect differs between networks.
        start_step: the first step on which the penalty acts.
        warmup_steps: over how many steps from ``start_step`` on the weight rises linearly to β; 0 for none.

    Attributes:
        step: optimizer steps taken so far; the schedule's clock. A framework that counts its own may set it.
        last_step: the :class:`RegularizerStep` of the latest step with a penalty, None before the first.

    Raises:
        FlatminimaError: for a value outside its range, a model without trainable parameters, half-precision or complex
            parameters, a model in DataParallel, FSDP1, or in part under FSDP2, or one that does not go with ``passes``.

    Example:
        >>> import torch
        >>> from flatminima import FisherTraceRegularizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(5)]
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
        >>> regularizer = FisherTraceRegularizer(model, alpha=1e-4, beta=10.0, num_sub_batches=8, max_grad_norm=5.0)
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     loss = regularizer.backward(loss_fn, inputs, targets)  # was: loss_fn(model(inputs), targets).backward()
        ...     optimizer.step()
        >>> sorted(regularizer.diagnostics())
        ['beta', 'clip_rate', 'fisher_trace', 'grad_norm', 'penalty', 'penalty_to_gradient', 'rounding_share']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1e-4,
        beta: float = 10.0,
        num_sub_batches: int = 8,
        max_grad_norm: float | None = None,
        estimator: Estimator = "finite-difference",
        main_gradient: MainGradient = "whole-batch",
        batch_statistics: BatchStatistics = "sub-batch",
        passes: PassesName = "one-by-one",
        parameters: Iterable[nn.Parameter] | None = None,
        every: int = 1,
        start_step: int = 0,
        warmup_steps: int = 0,
    ) -> None:
        require_usable(model)
        require_positive("alpha", alpha)
        require_positive("beta", beta, or_zero=True)
        require_number("max_grad_norm", max_grad_norm, optional=True)
        _require_count("num_sub_batches", num_sub_batches, at_least=1)
        require(
            max_grad_norm is None or max_grad_norm > 0, f"max_grad_norm must be positive or None, got {max_grad_norm}"
        )
        _require_choice("estimator", estimator, Estimator)
        _require_choice("main_gradient", main_gradient, MainGradient)
        _require_choice("batch_statistics", batch_statistics, BatchStatistics)
        _require_choice("passes", passes, PassesName)
        require(
            main_gradient == "whole-batch" or batch_statistics == "sub-batch",
            f"main_gradient='sub-batches' needs batch_statistics='sub-batch' (got {batch_statistics!r}): "
            "running statistics would never be updated",
        )
        _require_count("every", every, at_least=1)
        _require_count("start_step", start_step, at_least=0)
        _require_count("warmup_steps", warmup_steps, at_least=0)
        self.model = model
        self.alpha = alpha
        self.beta = beta
        self.num_sub_batches = int(num_sub_batches)
        self.max_grad_norm = max_grad_norm
        self.estimator = estimator
        self.main_gradient = main_gradient
        self.batch_statistics = batch_statistics
        self.passes = passes
        self.every = int(every)
        self.start_step = int(start_step)
        self.warmup_steps = int(warmup_steps)
        self.step = 0
        self.last_step: RegularizerStep | None = None
        refuse_other_sharding(model)
        self._passes = passes_for(passes, model, estimator)
        self._penalized_names = None if parameters is None else _known_parameters(model, parameters)
        self._clipped_steps: int | Tensor = 0
        self._micro_batches: list[tuple[float, RegularizerStep]] = []  # the micro-batches of the step in progress
        self._last_beta = 0.0
        self._rounding: Rounding | None = None  # found at the first penalty
        self._largest_batch = 0
        self._left = GradientsLeft()
        self._watch = PenaltyWatch()
        Weights.of(model, self._penalized_names)

    def backward(
        self,
        loss_fn: LossFunction,
        inputs: Inputs,
        targets: Any,
        *,
        weight: float = 1.0,
        last: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Add ∇[L + βR_α] to ``.grad``, as ``loss.backward()`` adds ∇L, then clip ``.grad``.

        Gradient accumulation: with K micro-batches per optimizer step, call this for each with ``weight=1/K``, and with
        ``last=False`` for all but the last. Every micro-batch is split into M sub-batches. After an error or an
        interruption (Ctrl-C) begin the step anew, with ``zero_grad``.

        Args:
            loss_fn: ``loss_fn(model_output, targets)`` → scalar, a mean over the samples.
            inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``); tensors have B rows.
            targets: a tensor, or a nested tuple or mapping of tensors, with B rows.
            weight: what L + βR_α of this call counts for, > 0.
            last: whether the optimizer steps next: only then is ``.grad`` clipped and exchanged between processes.
            scaler: the loop's gradient scaler (float16 autocast). ``.grad`` then holds the scaled gradient, clipped as
                the unscaled one would be, so go on with ``scaler.step(optimizer)``; ``scaler.unscale_`` is not needed.

        Returns:
            The main loss L, detached, neither weighted nor scaled: the one number a plain step would have given.

        Raises:
            NonFiniteError: if a loss is NaN or infinite; ``.grad`` is then left as it was.
            FlatminimaError: if tensors disagree about B, ``loss_fn`` does not return a differentiable scalar, or model
                and loss do not go with ``passes``.
        """

        def closure(batch: tuple[Inputs, Any]) -> Tensor:
            return loss_fn(run_model(self.model, batch[0]), batch[1])

        return self.backward_closure(closure, (inputs, targets), weight=weight, last=last, scaler=scaler)

    def backward_closure(
        self,
        closure: Closure,
        batch: Any,
        *,
        weight: float = 1.0,
        last: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """:meth:`backward` for a loss that calls the model itself, as models of Hugging Face do.

        Args:
            closure: ``closure(batch)`` → scalar, a mean over the samples. It is called on sub-batches as well, so it
                must use its argument only; sub-batches are new tensors, and may be written to.
            batch: a nested tuple, list or mapping of tensors with B rows.
            weight: as in :meth:`backward`.
            last: as in :meth:`backward`.
            scaler: as in :meth:`backward`.

        Returns:
            As :meth:`backward`.

        Raises:
            FlatminimaError: as :meth:`backward`.

        Example:
            >>> import torch
            >>> from flatminima import FisherTraceRegularizer
            >>> model = torch.nn.Linear(4, 3)
            >>> batch = {"x": torch.randn(16, 4), "labels": torch.randint(3, (16,))}
            >>> def closure(batch):
            ...     return torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
            >>> loss = FisherTraceRegularizer(model).backward_closure(closure, batch)
        """
        require_positive("weight", weight)
        self._left.warn_if_untouched()
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        try:
            return self._backward(closure, batch, weight, last, scaler)
        except BaseException as error:
            self._micro_batches = []  # of a step that is abandoned
            if not isinstance(error, Exception):  # interrupted between the penalty's gradient and the main one
                for parameter, gradient in gradients:
                    parameter.grad = gradient
            raise

    def _backward(
        self, closure: Closure, batch: Any, weight: float, last: bool, scaler: torch.amp.GradScaler | None
    ) -> Tensor:
        scale = 1.0 if scaler is None else _scale_of(scaler, self.model)
        is_main = self.is_due and self.main_gradient == "sub-batches"
        if is_main:
            refuse_accumulation_hooks(self.model)
        with in_place_of_main_forward(self.model, exchanged=last) if is_main else nullcontext():
            penalty = self.penalize(closure, batch)
        if penalty is not None and is_main:
            loss = penalty.loss
            require(any(penalty.used), NOT_DIFFERENTIABLE)
            penalty.add_gradient_to_grad(self.present_beta * weight * scale)
            penalty.add_main_gradient_to_grad(weight * scale)
            if last:
                weights = penalty.weights
                average_gradients(self.model, dict(zip(weights.names, weights.parameters, strict=True)))
        else:
            with exchange(self.model, wanted=last):
                main = scalar_loss(closure, batch)
                loss = main.detach()
                require_finite(loss)
                if penalty is not None:  # before the main gradient, so that the exchange carries both
                    penalty.add_gradient_to_grad(self.present_beta * weight * scale)
                with outside_autocast():
                    (main * (weight * scale)).backward()  # type: ignore[no-untyped-call]
        if penalty is not None and self.last_step is not None:
            self._micro_batches.append((weight, self.last_step))
        if last:
            self._end_step(scale)
        return loss

    def penalize(self, closure: Closure, batch: Any) -> Penalty | None:
        """The penalty alone, for frameworks that own the main backward pass; ``.grad`` and ``step`` stay as they are.

        Add it with ``penalty.add_gradient_to_grad(factor)`` after ``.grad`` is zeroed and before the main backward
        pass, where ``factor`` is :attr:`present_beta` times whatever the framework multiplies its loss with.

        Returns:
            The penalty, or None on a step where it does not act.

        Raises:
            NonFiniteError: if a sub-batch's loss is NaN or infinite.
            FlatminimaError: as :meth:`backward`.
        """
        if not self.is_due:
            return None
        since = self.step - self.start_step
        settings = PenaltySettings(
            self.alpha, self.num_sub_batches, self.estimator, self.batch_statistics, self._passes
        )
        update_buffers, size = self.main_gradient == "sub-batches", size_of(batch)
        resumed = since > 0 and not self._largest_batch  # perhaps at the last, short batch of an epoch
        before = Before(self.model, writes_buffers=update_buffers)
        try:
            with gathered_weights(self.model):
                weights = Weights.of(self.model, self._penalized_names)
                penalty = settings.penalty(
                    self.model,
                    closure,
                    batch,
                    weights,
                    before.generators,
                    update_buffers=update_buffers,
                    short=resumed or size < self._largest_batch,
                    first=self._rounding is None,
                )
            self._rounding = penalty.rounding or self._rounding
            self.last_step, self._last_beta = self._step_of(penalty), self.present_beta
            self._largest_batch = max(self._largest_batch, size)
            if penalty.buffers is not None:
                penalty.buffers.write()
            risen = max(self.warmup_steps, 1)
            if self.beta and since + 1 >= risen:
                first = since + 1 < risen + self.every
                self._watch.note(self.last_step, alpha=self.alpha, beta=self.beta, every=self.every, first=first)
        except BaseException as error:
            before.back_from(error)
            raise
        return penalty

    @property
    def is_due(self) -> bool:
        """Whether the penalty acts at this step, by ``start_step`` and ``every``."""
        since = self.step - self.start_step
        return since >= 0 and since % self.every == 0

    @property
    def present_beta(self) -> float:
        """The weight of the penalty at this step: β times ``every``, and less during the warm-up."""
        if self.step < self.start_step:
            return 0.0
        risen = (self.step - self.start_step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return self.beta * self.every * min(1.0, risen)

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the latest step with a penalty, for any logger; empty before the first. Waits for the device.

        Returns:
            ``fisher_trace``: mean_i ‖g_i‖². ``penalty``: R_α. ``beta``: its weight at that step.
            ``penalty_to_gradient``: β‖∇R_α‖ / ‖mean_i g_i‖; far above 1 the penalty is all there is, and below 1e-3 it
            does nothing. ``rounding_share``: the estimated part of ‖∇R_α‖ that is rounding error (see
            :class:`RegularizerStep`), at most 1; noise from kinks of ReLU is not in it. And, unless a framework owns
            the main pass, ``grad_norm``: before clipping; ``clip_rate``: the fraction of all steps so far that were
            clipped.
        """
        step = self.last_step
        if step is None:
            return {}
        (shares,) = shares_of([step], [self._last_beta])
        found = {
            "fisher_trace": float(step.trace),
            "penalty": float(step.penalty),
            "beta": self._last_beta,
            "penalty_to_gradient": shares.penalty_to_gradient,
            "rounding_share": shares.rounding_share,
        }
        if step.grad_norm is not None:
            found |= {"grad_norm": float(step.grad_norm), "clip_rate": float(self._clipped_steps) / self.step}
        return found

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs beside the weights, the optimizer and torch's generator: the counters."""
        return {"step": self.step, "clipped": int(self._clipped_steps)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            FlatminimaError: if ``state`` is something else.
        """
        require(set(state) == {"step", "clipped"}, f"not a FisherTraceRegularizer's state_dict: it has {sorted(state)}")
        self.step, self._clipped_steps = int(state["step"]), int(state["clipped"])
        self._micro_batches, self.last_step = [], None
        self._watch = PenaltyWatch()

    def _step_of(self, penalty: Penalty) -> RegularizerStep:
        assert self._rounding is not None  # the first penalty has looked
        exact = self.estimator == "hvp"
        error = penalty.loss.new_zeros(()) if exact else self._rounding.of_gradient(penalty.loss)
        return RegularizerStep(
            trace=penalty.trace,
            penalty=penalty.value,
            penalty_gradient_norm=norm_of(penalty.gradient),
            main_gradient_norm=norm_of(penalty.main_gradient),
            rounding_norm=error * (2 * penalty.trace / penalty.num_sub_batches).sqrt(),
        )

    def _end_step(self, scale: float | Tensor) -> None:
        """Clip ``.grad``, which is ``scale`` times the gradient, and count the step."""
        gradients = Gradients(self.model.parameters())
        grad_norm = gradients.norm() / scale
        if self.max_grad_norm is not None:
            gradients.clip(self.max_grad_norm, grad_norm)
            self._clipped_steps = self._clipped_steps + (grad_norm > self.max_grad_norm)
        if self._micro_batches:
            self.last_step = RegularizerStep.mean(self._micro_batches, grad_norm)
        self._micro_batches = []
        self._left.note(self.model.parameters())
        self.step += 1


def _scale_of(scaler: torch.amp.GradScaler, model: nn.Module) -> Tensor:
    scaled = scaler.scale(torch.ones((), device=device_of(model)))
    assert isinstance(scaled, Tensor)
    return scaled


def _known_parameters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> set[str]:
    require(isinstance(parameters, Iterable), f"parameters must be those of the model, got {parameters!r}")
    chosen = list(parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    require(
        all(id(parameter) in names for parameter in chosen),
        f"parameters must be those of the model ({type(model).__name__}), not copies or names",
    )
    return {names[id(parameter)] for parameter in chosen}


def _require_count(name: str, value: int, *, at_least: int) -> None:
    require_integer(name, value)
    require(value >= at_least, f"{name} must be at least {at_least}, got {value}")


def _require_choice(name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    require(value in allowed, f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
