"""What a run is: the frozen description that names its folder, and the paper's recipes (Jia & Su, Sec. 7, App. E)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag
from pydantic.dataclasses import dataclass

from flatminima.choices import Estimator, MainGradient
from flatminima.errors import FlatminimaError, require, require_one_of
from flatminima.lab.names import AUGMENTATIONS, OWN_NETWORKS
from flatminima.lab.runs.schedules import Approach, Landing, MultiStep, Plateau, Schedule
from flatminima.lab.schema import (
    STRICT,
    AtLeastOne,
    AtLeastZero,
    Count,
    Fraction,
    Kinded,
    NotNegative,
    Positive,
    kind_of,
    parse,
    plain,
    refusing,
)

Precision = Literal["32-true", "bf16-mixed", "tf32"]

_KEY_LENGTH = 12  # hexadecimal digits: 48 bits, so 10,000 runs under one root collide with probability 2e-7

_LATER = {"stop_at_loss": None}
"""Fields that came later than the first runs, with the default that these were trained with."""


@refusing("regularizer")
@dataclass(frozen=True, config=STRICT)
class RegularizerSpec(Kinded):
    """Hyper-parameters of Algorithm 1 (Jia & Su, Sec. 6)."""

    alpha: Positive = 1e-4
    """α, the length of the finite-difference step along a sub-batch's gradient."""
    beta: NotNegative = 10.0
    """β, the weight of the penalty."""
    num_sub_batches: AtLeastOne = 8
    """M, the number of equal sub-batches a mini-batch is split into."""
    max_grad_norm: Positive | None = None
    """τ, the global norm the gradient is clipped to (None: not clipped)."""
    start_epoch: AtLeastZero = 0
    """Epochs trained without the penalty before it is switched on."""
    estimator: Estimator = "finite-difference"
    """How the penalty's gradient is formed: by the paper's finite difference, or exactly, its limit for small α."""
    main_gradient: MainGradient = "whole-batch"
    """The main gradient by a pass of its own, or as the mean of the sub-batches', which saves that pass."""
    every: AtLeastOne = 1
    """Only every k-th update has the penalty, k times as strong."""


@refusing("sam")
@dataclass(frozen=True, config=STRICT)
class SharpnessAwareSpec(Kinded):
    """Hyper-parameters of the regularizer's rival: SAM (Foret et al., 2021) or ASAM (Kwon et al., 2021)."""

    rho: Positive = 0.05
    """ρ, how far the loss is looked at from the weights (SAM: about 0.05; ASAM: 0.5 to 2)."""
    adaptive: bool = False
    """ASAM: measure that distance relative to the weights' magnitudes."""
    max_grad_norm: Positive | None = None
    """The global norm the gradient is clipped to (None: not clipped)."""
    start_epoch: AtLeastZero = 0
    """Epochs of plain training before it is switched on."""


@refusing("gradient_norm")
@dataclass(frozen=True, config=STRICT)
class GradientNormSpec(Kinded):
    """Hyper-parameters of a rival: the gradient-norm penalty λ‖∇L(B, w)‖₂ (Zhao et al., 2022)."""

    weight: Positive = 0.04
    """λ, the weight of the penalty; at λ = r this is SAM."""
    radius: Positive = 0.05
    """r, the step along the gradient that the penalty's gradient is the finite difference over."""
    max_grad_norm: Positive | None = None
    """The global norm the gradient is clipped to (None: not clipped)."""
    start_epoch: AtLeastZero = 0
    """Epochs of plain training before it is switched on."""


@refusing("fisher_penalty")
@dataclass(frozen=True, config=STRICT)
class FisherPenaltySpec(Kinded):
    """Hyper-parameters of a rival: the Fisher penalty (Jastrzębski et al., 2021)."""

    weight: Positive = 0.01
    """The weight of the squared norm of the mini-batch's gradient at labels that the model draws."""
    max_grad_norm: Positive | None = None
    """The global norm the gradient is clipped to (None: not clipped)."""
    start_epoch: AtLeastZero = 0
    """Epochs of plain training before it is switched on."""


@refusing("unit_residuals")
@dataclass(frozen=True, config=STRICT)
class UnitResidualSpec(Kinded):
    """Hyper-parameters of Algorithm 1 at unit residuals (ours, exploratory)."""

    alpha: Positive = 1e-4
    """α, the length of the finite-difference step along a sub-batch's gradient."""
    beta: NotNegative = 1.0
    """β, the weight of the penalty."""
    num_sub_batches: AtLeastOne = 8
    """M, the number of equal sub-batches a mini-batch is split into."""
    max_grad_norm: Positive | None = None
    """τ, the global norm the gradient is clipped to (None: not clipped)."""
    start_epoch: AtLeastZero = 0
    """Epochs trained without the penalty before it is switched on."""


Regularizer = Annotated[
    Annotated[RegularizerSpec, Tag("RegularizerSpec")]
    | Annotated[SharpnessAwareSpec, Tag("SharpnessAwareSpec")]
    | Annotated[GradientNormSpec, Tag("GradientNormSpec")]
    | Annotated[FisherPenaltySpec, Tag("FisherPenaltySpec")]
    | Annotated[UnitResidualSpec, Tag("UnitResidualSpec")],
    Discriminator(kind_of),
]


@refusing()
@dataclass(frozen=True, config=STRICT)
class RunSpec:
    """One training run: everything that decides its bits on a given machine.

    Two equal specs are the same run; :attr:`key` names its folder. The optimizer is stochastic gradient descent, as
    in all of the paper's recipes. An epoch is ``N // batch_size`` full mini-batches of a fresh permutation of the N
    training images; the remainder sits that epoch out.

    Raises:
        FlatminimaError: A field is out of its range or of the wrong type; the message names it.

    Example:
        >>> spec = RunSpec(model="mlp", data="digits", augmentation="no-aug", epochs=3)
        >>> RunSpec.from_json(spec.to_json()) == spec
        True
    """

    model: str = "resnet20"
    """Network: cnn, resnet20, wrn28-2, densenet-bc-100, resnet8, resnet8-wide, for the digits small-cnn, mlp; or
    package.module:factory."""
    data: str = "cifar10"
    """Data set: digits, cifar10, cifar100, or a folder of parquet files train-*.parquet and test-*.parquet."""
    train_size: AtLeastOne | None = None
    """Train on this many images with their own labels, drawn at random (None: on all that are not confused)."""
    confusion: AtLeastZero = 0
    """Add this many other training images with random labels (the confusion set of Sec. 7.1, scenario I)."""
    validation: AtLeastZero = 0
    """Hold out this many training images, the same whatever the seed, and evaluate on them; they are never trained on.
    """
    augmentation: str = "4-crop-f"
    """Augmentation of the training images: no-aug, flip-only, 1-crop-f, 4-crop-f (Sec. 7.1, scenario II)."""
    batch_size: AtLeastOne = 128
    """Images in a mini-batch."""
    epochs: AtLeastOne | None = 200
    """Stop after this many epochs (None: only `iterations` limits the run)."""
    iterations: AtLeastOne | None = None
    """Stop after this many updates (None: only `epochs` limits the run); the earlier limit counts."""
    stop_at_loss: Positive | None = None
    """End with the first epoch whose loss on the un-augmented training set is at most this (None: go on to the limit).
    """
    lr: Positive = 0.1
    """Initial learning rate."""
    schedule: Schedule = field(default_factory=MultiStep)
    """How the learning rate changes: at fixed fractions of the run, on a plateau of the training loss, near
    stop_at_loss, or in one cycle."""
    momentum: Fraction = 0.9
    """Momentum of stochastic gradient descent."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: NotNegative = 1e-4
    """Weight decay (L2) on all parameters."""
    label_smoothing: Fraction = 0.0
    """Probability moved from the label to the uniform distribution."""
    regularizer: Regularizer | None = None
    """The Fisher trace regularizer, or a rival (None: plain training)."""
    evaluate_every: AtLeastOne = 1
    """Evaluate on the test images (and those held out) after every so many epochs, and after the last."""
    precision: Precision = "32-true"
    """Arithmetic of the training passes (tf32: on GPUs that have it); penalties and evaluation are always float32."""
    seed: Count = 0
    """Decides the initial weights, the training subset, the confusion set, the batches and the augmentation."""
    data_folder: str | None = field(default=None, compare=False)
    """Where the parquet files of `data` lie (None: where its name says); no part of what makes two runs the same."""

    def __post_init__(self) -> None:
        if re.fullmatch(r"[\w.]+:\w+", self.model) is None and self.model not in OWN_NETWORKS:  # no torch for these
            from flatminima.lab.networks import MODEL_NAMES

            require_one_of("model", self.model, MODEL_NAMES)
        require_one_of("augmentation", self.augmentation, AUGMENTATIONS)
        require(self.data != "", "data must name a data set or a folder, got an empty string")
        require(
            self.epochs is not None or self.iterations is not None,
            "epochs and iterations are both None: give at least one, or the run would never end",
        )
        require(
            self.stop_at_loss is not None or not isinstance(self.schedule, Approach | Landing),
            f"schedule {type(self.schedule).__name__} needs a loss to stop at: set stop_at_loss",
        )
        require(not self.nesterov or self.momentum > 0, "nesterov needs a positive momentum, got 0")

    @property
    def key(self) -> str:
        """The run's name: the first 12 hexadecimal digits of the SHA-256 of what makes it equal to another."""
        return _key_of(self.identity())

    @property
    def name(self) -> str:
        """Its folder's: the network, or its factory, and the key."""
        return name_of_run(self.identity())

    def identity(self) -> dict[str, Any]:
        """What makes it equal to another, JSON-able: every value but where the data lie."""
        return {name: value for name, value in self._written().items() if name != "data_folder"}

    def _written(self) -> dict[str, Any]:
        """Every value, JSON-able, but those that came later than the first runs and are as these had them."""
        return {name: value for name, value in plain(self).items() if name not in _LATER or value != _LATER[name]}

    @property
    def source(self) -> str:
        """What :func:`~flatminima.lab.data.sources.load_data` loads."""
        return self.data if self.data_folder is None else self.data_folder

    def iterations_per_epoch(self, num_samples: int) -> int:
        """Full mini-batches in ``num_samples`` training images.

        Raises:
            FlatminimaError: There is not even one.
        """
        require(
            num_samples >= self.batch_size,
            f"batch_size {self.batch_size} is larger than the training set of {num_samples} images; lower batch_size",
        )
        return num_samples // self.batch_size

    def total_iterations(self, num_samples: int) -> int:
        """Updates in the whole run on ``num_samples`` training images: the earlier of the two limits."""
        limits = [self.iterations] if self.iterations is not None else []
        if self.epochs is not None:
            limits.append(self.epochs * self.iterations_per_epoch(num_samples))
        return min(limits)

    def to_json(self) -> str:
        """The canonical text: one line, fields sorted, floats in their shortest exact form."""
        return _canonical(self._written())

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """The spec written by :meth:`to_json`.

        Raises:
            FlatminimaError: The text is not JSON, or not that of a RunSpec.
        """
        try:
            spec = parse(cls, text)
            _require_all("RunSpec", plain(spec), json.loads(text))
            return spec
        except FlatminimaError as error:
            raise FlatminimaError(f"not a run specification: {error}") from None


def name_of_run(identity: dict[str, Any]) -> str:
    """:attr:`RunSpec.name` of a run that is known by its :meth:`RunSpec.identity` alone, of another version maybe."""
    return f"{str(identity.get('model')).rpartition(':')[2]}-{_key_of(identity)}"


_FIRST_KINDS = {"schedule": (MultiStep, Plateau), "regularizer": (RegularizerSpec, SharpnessAwareSpec)}


def with_kinds(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity whose schedule and regularizer say of which kind they are, as they did not when there were two each.

    Their fields tell them apart.
    """
    found = dict(identity)
    for name, kinds in _FIRST_KINDS.items():
        part: Any = found.get(name)
        if isinstance(part, Mapping) and "kind" not in part:
            for kind in kinds:
                if {field.name for field in dataclasses.fields(kind)} == set(part):
                    found[name] = {**part, "kind": kind.__name__}
    return found


def _key_of(identity: dict[str, Any]) -> str:
    from flatminima.lab.storage import digest_of

    return digest_of(_canonical(identity).encode())[:_KEY_LENGTH]


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """An independent seed for each purpose and each epoch or iteration."""
    from flatminima.lab.storage import digest_of

    return int(digest_of(f"{seed} {purpose} {index}".encode())[:16], base=16) >> 1


def _require_all(holder: str, fields: dict[str, Any], written: dict[str, Any]) -> None:
    """Refuse a text that leaves a field to its default: it was not written by us, or not all of it is left."""
    for name, value in fields.items():
        is_there = name in written or (holder == "RunSpec" and name in _LATER)
        require(is_there, f"{holder} has no value for its field {name}; was it written by another version?")
        if isinstance(value, dict):
            _require_all(f"{holder}.{name}", value, written[name])


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


_RESNET20 = RunSpec(model="resnet20", lr=0.1, batch_size=128, momentum=0.9, weight_decay=1e-4)

RECIPES: dict[str, RunSpec] = {
    # App. E; initialization as in He et al. (2016a)
    "cnn": RunSpec(model="cnn", lr=0.01, schedule=MultiStep((0.5, 0.75)), epochs=200, nesterov=True),
    # He et al. (2016a): ÷10 at 32k and 48k of 64k iterations
    "resnet20": dataclasses.replace(_RESNET20, schedule=MultiStep((0.5, 0.75)), epochs=None, iterations=64_000),
    # Zagoruyko & Komodakis (2016): ×0.2 at epochs 60, 120 and 160 of 200
    "wrn28-2": RunSpec(
        model="wrn28-2", schedule=MultiStep((0.3, 0.6, 0.8), factor=0.2), epochs=200, weight_decay=5e-4, nesterov=True
    ),
    # Huang et al. (2017)
    "densenet-bc-100": RunSpec(model="densenet-bc-100", batch_size=64, epochs=300, nesterov=True),
    # Sec. 7.1: ÷10 whenever the training loss plateaus
    "scenario": dataclasses.replace(_RESNET20, schedule=Plateau(), epochs=200),
    # Ours, for a first look: seconds on one core
    "digits": RunSpec(
        model="small-cnn", data="digits", augmentation="no-aug", batch_size=64, epochs=40, lr=0.05, nesterov=True
    ),
}
"""The training of every network in the paper, by name; change single fields with :func:`dataclasses.replace`."""
