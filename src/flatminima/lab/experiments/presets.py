"""The sizes that the paper's experiments come in.

Every experiment comes in four sizes. ``paper`` is the paper's, nothing left out. The others keep its form, that is
what is varied, in how many settings, over five seeds, and scale down what is trained:

* ``medium``: 10,000 CIFAR-10 images (scenario I: and up to 5,000 more with random labels, as in the paper), and
  ResNet-8 with twice the channels in its later stages, under one cycle of the learning rate. With flips, 16 epochs of
  it took 200 seconds of a busy core with AVX2 at seed 100, to 29.4 % test error and 95.9 % training accuracy. With
  5,000 random labels 24 epochs at learning rate 0.2 and weight decay 5e-4, as in Table 1, came to 79.1 %, and 34 of 40
  at 0.1 and the paper's 1e-4 to 98.7 %: so the scenarios have those. Under 4-crop-f, in scenario II, it fitted 88.9 %
  of its images in 40 epochs, 98.8 % in 120, and 99.2 % in 150, in half an hour: so all of that scenario has 150. An
  image's forward-backward took 1.0 ms there, ResNet-8's 0.5 (it has a quarter of the parameters, few for 5,000 random
  labels), that of 32-64-128 channels 1.4, and ResNet-20's 5.7. Channels-last gives 5 % of that time, a compiled step
  6 % of the best but none of the median, and its compilation takes 17 s. A test takes half an epoch, so there is one,
  at the end. Table 1 has crops and symmetric label noise, and a row with label noise alone.
* ``small``: CIFAR-10 images and ResNet-8, a pre-activation ResNet with one block a stage that halves the image at once.
  It fits 2,000 images, and 1,000 more with random labels, in 40 epochs of mini-batches of 32: about a minute on one
  core. These are not augmented, as random labels under 4-crop-f would take far longer to fit; in scenario II, where
  the augmentation is what varies, it fits 1,000 images under 4-crop-f in 240 epochs at half the learning rate, in two
  and a half minutes. Batch sizes are those of the paper over eight, as the sets are smaller, so that the largest still
  gets enough updates to fit. A scenario takes 20 to 25 minutes on two cores.
* ``digits``: networks of seconds on the embedded 8×8 digits, to see the whole machinery at work in minutes. Digits are
  too easy to tell much about the claims; with random labels among them Table 1 has something to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flatminima.lab.names import PresetName, Protocol
from flatminima.lab.runs import (
    RECIPES,
    Approach,
    FisherPenaltySpec,
    GradientNormSpec,
    Landing,
    Measuring,
    MultiStep,
    OneCycle,
    Regularizer,
    RegularizerSpec,
    RunSpec,
    UnitResidualSpec,
)

GRADIENT_NORM, FISHER_PENALTY, UNIT_RESIDUALS = "gradient-norm penalty", "Fisher penalty", "+reg, unit residuals"
"""Ways of training in Table 1 where they are affordable."""


@dataclass(frozen=True)
class Preset:
    """The sizes of all experiments."""

    scenario: RunSpec
    """Training in scenarios I and III, with the default of all that they vary."""
    augmented: RunSpec
    """Training in scenario II."""
    clean_images: int
    """Images with their own labels in scenario I."""
    confusion: tuple[int, ...]
    """Sizes of the confusion set in scenario I."""
    augmentations: tuple[str, ...]
    """Schemes of scenario II."""
    batch_sizes: tuple[int, ...]
    """Batch sizes of scenario III."""
    networks: Mapping[str, RunSpec]
    """Trainings of Table 1 without a regularizer, by the names of network and data."""
    measured: tuple[str, ...]
    """Which of them are in Table 2."""
    betas: tuple[float, ...]
    """β of the search."""
    sub_batches: tuple[int, ...]
    """M of the search."""
    clipping: tuple[float, ...]
    """τ of the search."""
    validation: int
    """Training images held out for the search."""
    regularizer: RegularizerSpec
    """For networks that were not searched for."""
    measuring: Measuring
    """How minima are measured."""
    matched: tuple[RunSpec, RunSpec]
    """``scenario`` and ``augmented`` under the matched protocol (Jiang et al. 2020): each run ends at the same loss."""
    rivals: Mapping[str, Mapping[str, Regularizer]] = field(default_factory=dict)
    """What Table 1 trains with beside what it does in every preset, by the names in ``networks``, and of the arm."""
    every: tuple[int, ...] = ()
    """Table 1 also has the regularizer with a penalty at only every k-th update, for these k."""
    search_seed: int = 0
    """The one of the search's runs."""

    def under(self, protocol: Protocol) -> Preset:
        """These sizes with the scenarios' runs ending as the protocol has it."""
        if protocol == "paper":
            return self
        scenario, augmented = self.matched
        return replace(self, scenario=scenario, augmented=augmented)


_APPROACH, _EARLIER = Approach(), Approach(near=5)


def _rivals(
    gradient_norm: GradientNormSpec, fisher_penalty: FisherPenaltySpec, unit_residuals: UnitResidualSpec
) -> dict[str, Regularizer]:
    return {GRADIENT_NORM: gradient_norm, FISHER_PENALTY: fisher_penalty, UNIT_RESIDUALS: unit_residuals}


def _matched(
    run: RunSpec, lr: float, loss: float, epochs: int, schedule: MultiStep | Approach | Landing = _APPROACH
) -> RunSpec:
    """A run that ends at a loss on its training set.

    Its learning rate is small, and smaller near the end, so that an epoch changes the loss by a few per cent there:
    losses of several runs then differ by no more.
    """
    return replace(run, lr=lr, schedule=schedule, stop_at_loss=loss, epochs=epochs, iterations=None)


_PAPER = Preset(
    scenario=RECIPES["scenario"],
    augmented=RECIPES["scenario"],
    clean_images=10_000,
    confusion=(0, 1000, 2000, 3000, 4000, 5000),
    augmentations=("no-aug", "flip-only", "1-crop-f", "4-crop-f"),
    batch_sizes=(128, 256, 512, 1024),
    networks={
        "CNN, CIFAR-10": RECIPES["cnn"],
        "WRN, CIFAR-10": RECIPES["wrn28-2"],
        "DenseNet, CIFAR-10": RECIPES["densenet-bc-100"],
        "ResNet, CIFAR-10": RECIPES["resnet20"],
        "CNN, CIFAR-100": replace(RECIPES["cnn"], data="cifar100"),
        "WRN, CIFAR-100": replace(RECIPES["wrn28-2"], data="cifar100"),
        "DenseNet, CIFAR-100": replace(RECIPES["densenet-bc-100"], data="cifar100"),
    },
    measured=("ResNet, CIFAR-10", "WRN, CIFAR-10", "DenseNet, CIFAR-10"),
    betas=(10, 20, 30, 40, 50, 75, 100, 125),
    sub_batches=(4, 8, 16),
    clipping=(1, 5, 10, 15),
    validation=5000,
    # as in the authors' code, which switches the penalty on at epoch 60
    regularizer=RegularizerSpec(alpha=1e-4, beta=10, num_sub_batches=8, max_grad_norm=5, start_epoch=60),
    matched=(_matched(RECIPES["scenario"], 0.01, 0.01, 400), _matched(RECIPES["scenario"], 0.01, 0.05, 1000, _EARLIER)),
    measuring=Measuring(robustness_samples=100, on_singular="skip"),  # of all samples, as the paper has it
)

_MEDIUM_RUN = RunSpec(
    model="resnet8-wide",
    train_size=10_000,
    augmentation="flip-only",
    batch_size=64,
    epochs=40,
    schedule=OneCycle(pct_start=0.25),
    nesterov=True,
    evaluate_every=1000,  # a test takes as long as half an epoch: only at the end
)

_MEDIUM_TABLE_RUN = replace(_MEDIUM_RUN, augmentation="4-crop-f", epochs=15, lr=0.2, weight_decay=5e-4)

# labels drawn from all classes for a part of the images are symmetric label noise: 9 of 10 become wrong
_MEDIUM_NETWORKS = {
    "ResNet-8 wide, CIFAR-10": _MEDIUM_TABLE_RUN,
    "10 % label noise": replace(_MEDIUM_TABLE_RUN, train_size=9000, confusion=1000),
    "20 % label noise": replace(_MEDIUM_TABLE_RUN, train_size=8000, confusion=2000),
    # without augmentation as many epochs come to all labels, wrong ones too; the others come to four fifths
    "20 % label noise, no-aug": replace(_MEDIUM_RUN, augmentation="no-aug", epochs=15, train_size=8000, confusion=2000),
}

_MEDIUM = Preset(
    scenario=_MEDIUM_RUN,
    augmented=replace(_MEDIUM_RUN, epochs=150),
    clean_images=_PAPER.clean_images,
    confusion=_PAPER.confusion,
    augmentations=_PAPER.augmentations,
    batch_sizes=(32, 64, 128, 256),
    networks=_MEDIUM_NETWORKS,
    measured=tuple(_MEDIUM_NETWORKS),
    betas=(1, 3, 10, 100, 1000),
    sub_batches=(4,),
    clipping=(5,),
    validation=5000,
    regularizer=RegularizerSpec(alpha=1e-4, beta=100, num_sub_batches=4, max_grad_norm=5),
    matched=(
        _matched(_MEDIUM_RUN, 0.05, 0.02, 200, Approach(factor=0.1)),  # at 0.2 the last epoch went 16 % below
        # at a fixed rate near the loss, networks without augmentation leap from ten times it to a quarter below it
        _matched(_MEDIUM_RUN, 0.05, 0.02, 400, Landing()),
    ),
    measuring=Measuring(measures=("cheap",), trials=10, robustness_samples=10, on_singular="skip"),
    every=(10,),
    search_seed=100,
)

_SMALL_RUN = RunSpec(
    model="resnet8",
    train_size=2000,
    augmentation="no-aug",
    batch_size=32,
    epochs=40,
    schedule=MultiStep((0.5, 0.75)),
    evaluate_every=1000,  # a test takes as long as two epochs: only at the end
)

_SMALL = Preset(
    scenario=_SMALL_RUN,
    augmented=replace(_SMALL_RUN, train_size=1000, epochs=240, lr=0.05),
    clean_images=2000,
    confusion=(0, 200, 400, 600, 800, 1000),
    augmentations=_PAPER.augmentations,
    batch_sizes=(16, 32, 64, 128),
    networks={"ResNet-8, CIFAR-10": _SMALL_RUN},
    measured=("ResNet-8, CIFAR-10",),
    betas=(10, 100, 1000),
    sub_batches=(4, 8),
    clipping=(1, 5),
    validation=5000,
    regularizer=RegularizerSpec(alpha=1e-4, beta=100, num_sub_batches=4, max_grad_norm=5),
    matched=(
        _matched(_SMALL_RUN, 0.01, 0.01, 400),
        _matched(replace(_SMALL_RUN, train_size=1000), 0.01, 0.05, 1500, _EARLIER),
    ),
    # the least error on 5,000 held-out images at seed 100, in runs of 10 epochs (plain: 55.42 %)
    rivals={
        "ResNet-8, CIFAR-10": _rivals(
            GradientNormSpec(weight=0.08, radius=0.1),  # r = 0.1, 0.2: 54.78, 55.14 %
            FisherPenaltySpec(weight=0.001),  # 0.001, 0.01: 53.66, 55.42 %
            UnitResidualSpec(beta=1, num_sub_batches=4, max_grad_norm=5),  # β = 1, 10: 55.24, 55.62 %
        )
    },
    measuring=Measuring(measures=("cheap",), trials=20, robustness_samples=10, on_singular="skip"),
    every=(10,),
)

_DIGITS_RUN = RunSpec(
    model="mlp",
    data="digits",
    train_size=600,
    augmentation="no-aug",
    batch_size=50,
    epochs=40,
    lr=0.05,
    schedule=MultiStep((0.5, 0.75)),
    nesterov=True,
    weight_decay=5e-4,
    evaluate_every=10,
)

_DIGITS_CNN_RUN = replace(_DIGITS_RUN, model="small-cnn", epochs=20)

_DIGITS = Preset(
    scenario=_DIGITS_RUN,
    augmented=replace(_DIGITS_RUN, epochs=120),
    clean_images=600,
    confusion=(0, 60, 120, 180, 240, 300),
    augmentations=_PAPER.augmentations,
    batch_sizes=(25, 50, 100, 200),
    networks={
        "MLP, digits": _DIGITS_RUN,
        "CNN, digits": _DIGITS_CNN_RUN,
        "MLP, 25 % label noise": replace(_DIGITS_RUN, confusion=200),
        "CNN, 25 % label noise": replace(_DIGITS_CNN_RUN, confusion=200),
    },
    measured=("MLP, digits", "CNN, digits"),
    betas=(20, 200, 2000),
    sub_batches=(5, 10),
    clipping=(1, 5),
    validation=300,
    regularizer=RegularizerSpec(alpha=1e-4, beta=2000, num_sub_batches=5, max_grad_norm=5),
    matched=(
        _matched(_DIGITS_RUN, 0.005, 0.02, 600, MultiStep(())),  # small enough throughout
        # the mlp cannot fit the digits under 4-crop-f
        _matched(_DIGITS_CNN_RUN, 0.02, 0.05, 600, _EARLIER),
    ),
    # the least error on 300 held-out images at seed 100 (plain: 3.00 and 3.33 %); of equals the strongest, which is the
    # least like plain training
    rivals={
        "MLP, digits": _rivals(
            GradientNormSpec(weight=0.16, radius=0.2),  # r = 0.05, 0.1, 0.2: 3.00, 2.67, 2.33 %
            FisherPenaltySpec(weight=0.01),  # 0.001, 0.01, 0.1, 1: 3.00, 3.00, 3.67, 83.00 %
            UnitResidualSpec(beta=10, num_sub_batches=5, max_grad_norm=5),  # 1, 10, 100, 1000: 3.00, 3.00, 4.00, 3.67 %
        ),
        "CNN, digits": _rivals(
            GradientNormSpec(weight=0.08, radius=0.1),  # r = 0.05, 0.1, 0.2: 3.00, 2.67, 3.33 %
            FisherPenaltySpec(weight=0.001),  # 0.001, 0.01, 0.1, 1: 3.33, 5.00, 89.33, 91.67 %
            UnitResidualSpec(beta=1, num_sub_batches=5, max_grad_norm=5),  # 1, 10, 100, 1000: 2.67, 3.33, 3.33, 10.67 %
        ),
        # plain: 17.00 and 12.67 %
        "MLP, 25 % label noise": _rivals(
            # r = 0.05, 0.1, 0.2, 0.4, 0.8, 1.6: 16.00, 13.67, 9.67, 6.67, 4.67, 24.33 %
            GradientNormSpec(weight=0.64, radius=0.8),
            FisherPenaltySpec(weight=0.1),  # 0.001, 0.01, 0.1, 1: 14.67, 14.33, 9.00, 15.67 %
            # 1, 10, 100, 1000, 10000: 15.00, 13.33, 9.33, 5.00, 69.67 %
            UnitResidualSpec(beta=1000, num_sub_batches=5, max_grad_norm=5),
        ),
        "CNN, 25 % label noise": _rivals(
            GradientNormSpec(weight=0.16, radius=0.2),  # r = 0.05, 0.1, 0.2, 0.4: 9.33, 7.00, 7.00, 90.67 %
            FisherPenaltySpec(weight=0.1),  # 0.001, 0.01, 0.1: 13.00, 13.67, 12.67 %
            # 1, 10, 100, 1000: 15.00, 15.33, 4.33, 16.00 %
            UnitResidualSpec(beta=100, num_sub_batches=5, max_grad_norm=5),
        ),
    },
    measuring=Measuring(measures=("cheap",), trials=10, robustness_samples=20, on_singular="skip"),
    every=(10,),
    search_seed=100,
)

PRESETS: dict[PresetName, Preset] = {"paper": _PAPER, "medium": _MEDIUM, "small": _SMALL, "digits": _DIGITS}
