"""The paper's experiments (Jia & Su, Sec. 7, App. E), each as an :class:`~flatminima.lab.experiments.Experiment`.

Every experiment comes in three sizes. ``paper`` is the paper's, nothing left out. The other two keep its form, that is
what is varied, in how many settings, over five seeds, and scale down what is trained:

* ``small``: CIFAR-10 images and ResNet-8, a pre-activation ResNet with one block a stage that halves the image at once.
  It fits 2,000 images, and 1,000 more with random labels, in 40 epochs of mini-batches of 32: about a minute on one
  core. These are not augmented, as random labels under 4-crop-f would take far longer to fit; in scenario II, where
  the augmentation is what varies, it fits 1,000 images under 4-crop-f in 240 epochs at half the learning rate, in two
  and a half minutes. Batch sizes are those of the paper over eight, as the sets are smaller, so that the largest still
  gets enough updates to fit. A scenario takes 20 to 25 minutes on two cores.
* ``digits``: networks of seconds on the embedded 8×8 digits, to see the whole machinery at work in minutes. Digits are
  too easy to tell much about the claims.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flatminima.errors import FlatminimaError
from flatminima.lab.data import load_data
from flatminima.lab.experiments import NORMALIZED, Experiment, Setting
from flatminima.lab.measuring import Measuring
from flatminima.lab.specs import RECIPES, MultiStep, RegularizerSpec, RunSpec, SharpnessAwareSpec

PLAIN, REGULARIZED, EXACT, SAM, MATCHED = "plain", "+reg", "+reg, hvp", "SAM", "plain, equal cost"
"""The ways of training in Table 1; the paper has the first two."""

MATCHED_COST = 3
"""Forward-backwards of a regularized update in plain ones: how much longer plain training gets at equal cost."""

PresetName = Literal["paper", "small", "digits"]


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
    measuring=Measuring(on_singular="skip"),
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
    measuring=Measuring(trials=20, robustness_samples=10, on_singular="skip"),
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
_DIGITS = Preset(
    scenario=_DIGITS_RUN,
    augmented=replace(_DIGITS_RUN, epochs=120),
    clean_images=600,
    confusion=(0, 60, 120, 180, 240, 300),
    augmentations=_PAPER.augmentations,
    batch_sizes=(25, 50, 100, 200),
    networks={
        "MLP, digits": _DIGITS_RUN,
        "CNN, digits": replace(_DIGITS_RUN, model="small-cnn", epochs=20),
    },
    measured=("MLP, digits", "CNN, digits"),
    betas=(200, 2000),
    sub_batches=(5, 10),
    clipping=(1, 5),
    validation=300,
    regularizer=RegularizerSpec(alpha=1e-4, beta=2000, num_sub_batches=5, max_grad_norm=5),
    measuring=Measuring(trials=10, robustness_samples=20, on_singular="skip"),
)

PRESETS: dict[PresetName, Preset] = {"paper": _PAPER, "small": _SMALL, "digits": _DIGITS}

_PAPERS_TABLE_1 = {
    "CNN, CIFAR-10": ((8.52, 0.08), (7.46, 0.13)),
    "WRN, CIFAR-10": ((5.44, 0.04), (4.80, 0.10)),
    "DenseNet, CIFAR-10": ((4.61, 0.08), (4.31, 0.08)),
    "ResNet, CIFAR-10": ((8.50, 0.31), (7.91, 0.25)),
    "CNN, CIFAR-100": ((31.12, 0.35), (29.19, 0.21)),
    "WRN, CIFAR-100": ((25.52, 0.15), (23.65, 0.14)),
    "DenseNet, CIFAR-100": ((22.54, 0.32), (22.19, 0.28)),
}
_PAPERS_TABLE_2 = {
    "ResNet, CIFAR-10": ((-979.3, 22.3), (-1138.1, 11.0)),
    "WRN, CIFAR-10": ((-737.6, 20.3), (-804.8, 18.7)),
    "DenseNet, CIFAR-10": ((-850.3, 23.5), (-886.2, 20.5)),
}


def scenario_1(preset: Preset) -> Experiment:
    """Figure 1: minima told apart by the size of a confusion set."""
    base = replace(preset.scenario, train_size=preset.clean_images)
    return Experiment(
        name="scenario-1",
        title="Scenario I: a confusion set of varying size",
        question=(
            f"{preset.clean_images:,} images with their own labels are trained on together with a set of other images "
            "with random labels. The larger that set, the worse the minimum generalizes. Which measure, taken on the "
            "clean images, follows? In the paper (Figure 1) all do but robustness."
        ),
        answers="ranking",
        factor="images with random labels",
        settings=tuple(Setting(f"{size:,}", PLAIN, replace(base, confusion=size)) for size in preset.confusion),
        measuring=preset.measuring,
        captured={"log_det_fisher": True, "spectral_radius": True, "frobenius_norm": True, "robustness": False},
    )


def scenario_2(preset: Preset) -> Experiment:
    """Figure 2: minima told apart by the augmentation they were trained with."""
    return Experiment(
        name="scenario-2",
        title="Scenario II: varied data augmentation",
        question=(
            "The weaker the augmentation, the worse the minimum generalizes. Which measure, taken on the un-augmented "
            "training images, follows? In the paper (Figure 2) γ̂ does, and all others fail."
        ),
        answers="ranking",
        factor="augmentation",
        settings=tuple(
            Setting(scheme, PLAIN, replace(preset.augmented, augmentation=scheme)) for scheme in preset.augmentations
        ),
        measuring=preset.measuring,
        captured={"log_det_fisher": True, "spectral_radius": False, "frobenius_norm": False, "robustness": False},
    )


def scenario_3(preset: Preset) -> Experiment:
    """Figure 3: minima told apart by the batch size they were trained with."""
    return Experiment(
        name="scenario-3",
        title="Scenario III: varied batch size",
        question=(
            "Large mini-batches lead to minima that generalize worse. Which measure follows? In the paper (Figure 3) "
            "all do but robustness."
        ),
        answers="ranking",
        factor="batch size",
        settings=tuple(
            Setting(f"{size:,}", PLAIN, replace(preset.scenario, batch_size=size)) for size in preset.batch_sizes
        ),
        measuring=preset.measuring,
        captured={"log_det_fisher": True, "spectral_radius": True, "frobenius_norm": True, "robustness": False},
    )


def table_1(preset: Preset, chosen: Mapping[str, RegularizerSpec]) -> Experiment:
    """Table 1: test errors with and without the regularizer, and what the paper lacks beside them."""
    settings = []
    for case, plain in preset.networks.items():
        regularizer = chosen.get(case, preset.regularizer)
        settings += [
            Setting(case, PLAIN, plain),
            Setting(case, REGULARIZED, replace(plain, regularizer=regularizer)),
            Setting(case, EXACT, replace(plain, regularizer=replace(regularizer, estimator="hvp"))),
            Setting(case, SAM, replace(plain, regularizer=SharpnessAwareSpec())),
            Setting(case, MATCHED, _prolonged(plain, MATCHED_COST)),
        ]
    searched = [case for case in preset.networks if case in chosen]
    return Experiment(
        name="table-1",
        title="Table 1: test errors with and without the regularizer",
        question=(
            "Does training with the regularizer (+reg, Algorithm 1) lower the test error? In the paper it does for "
            "every network. Beside it, and not in the paper: the same penalty by exact Hessian-vector products (hvp), "
            f"SAM with its usual ρ = {SharpnessAwareSpec.rho}, and plain training that is {MATCHED_COST} times as long "
            "and so costs as much. " + _how_chosen(preset, searched)
        ),
        answers="comparison",
        factor="network, data",
        settings=tuple(settings),
        measuring=None,
        published={
            (case, arm): numbers
            for case, pair in _PAPERS_TABLE_1.items()
            for arm, numbers in zip((PLAIN, REGULARIZED), pair, strict=True)
        },
    )


def table_2(preset: Preset, chosen: Mapping[str, RegularizerSpec]) -> Experiment:
    """Table 2: γ̂ with and without the regularizer; the runs are those of Table 1."""
    settings = tuple(
        setting
        for setting in table_1(preset, chosen).settings
        if setting.case in preset.measured and setting.arm in (PLAIN, REGULARIZED)
    )
    return Experiment(
        name="table-2",
        title="Table 2: γ̂ with and without the regularizer",
        question=(
            "Does the regularizer lead to minima with a smaller γ̂, as it should if that is why it works? In the paper "
            "it does. As training losses differ, γ̂ is taken at normalized logits, z / (0.04 ‖z‖), as in the authors' "
            "code."
        ),
        answers="comparison",
        factor="network, data",
        settings=settings,
        measuring=preset.measuring,
        quantity=NORMALIZED,
        published={
            (case, arm): numbers
            for case, pair in _PAPERS_TABLE_2.items()
            for arm, numbers in zip((PLAIN, REGULARIZED), pair, strict=True)
        },
    )


def search(preset: Preset) -> Experiment:
    """The grid of Sec. 7.2: β, M and τ by the error on held-out training images."""
    return Experiment(
        name="search",
        title="Search: the regularizer's hyper-parameters",
        question=(
            f"Which β, M and τ give the least error on {preset.validation:,} held-out training images? The winners are "
            "what Tables 1 and 2 are trained with, on all training images."
        ),
        answers="choice",
        factor="network, data",
        settings=tuple(
            Setting(case, described(regularizer), held_out(preset, plain, regularizer))
            for case, plain in preset.networks.items()
            for regularizer in grid(preset)
        ),
        measuring=None,
        seeds=(0,),
        quantity="validation_error",
    )


def grid(preset: Preset) -> list[RegularizerSpec]:
    """Every combination of the search."""
    combinations = itertools.product(preset.betas, preset.sub_batches, preset.clipping)
    return [
        replace(preset.regularizer, beta=beta, num_sub_batches=number, max_grad_norm=norm)
        for beta, number, norm in combinations
    ]


def held_out(preset: Preset, plain: RunSpec, regularizer: RegularizerSpec) -> RunSpec:
    """A run of the search."""
    return replace(plain, regularizer=regularizer, validation=preset.validation)


def described(regularizer: RegularizerSpec) -> str:
    """The searched hyper-parameters in a line."""
    norm = regularizer.max_grad_norm
    return f"β={regularizer.beta:g}, M={regularizer.num_sub_batches}, τ={'∞' if norm is None else f'{norm:g}'}"


def _how_chosen(preset: Preset, searched: list[str]) -> str:
    if len(searched) == len(preset.networks):
        return "β, M and τ are the search's."
    some = f"those of {', '.join(searched)} are the search's, the others" if searched else "they are a guess,"
    return f"Not all β, M and τ have been searched for: {some} {described(preset.regularizer)}."


def _prolonged(spec: RunSpec, factor: int) -> RunSpec:
    return replace(
        spec,
        epochs=None if spec.epochs is None else factor * spec.epochs,
        iterations=None if spec.iterations is None else factor * spec.iterations,
    )


_CLASSES = {"cifar10": 10, "cifar100": 100}

EXPERIMENTS = ("search", "scenario-1", "scenario-2", "scenario-3", "table-1", "table-2")
"""Their names, in an order in which each finds what it needs."""


def experiment(
    name: str,
    preset: Preset,
    *,
    chosen: Mapping[str, RegularizerSpec],
    data: Path | None,
    seeds: tuple[int, ...] | None,
) -> Experiment:
    """One of :data:`EXPERIMENTS`.

    Args:
        name: which.
        preset: how large.
        chosen: the search's winners by case.
        data: a folder that holds CIFAR-10 or CIFAR-100 as parquet files, or the folders cifar10 and cifar100 with them
            (None: from the Hugging Face hub).
        seeds: other seeds than the experiment's own; the search keeps its one.
    """
    builders: dict[str, Callable[[], Experiment]] = {
        "search": lambda: search(preset),
        "scenario-1": lambda: scenario_1(preset),
        "scenario-2": lambda: scenario_2(preset),
        "scenario-3": lambda: scenario_3(preset),
        "table-1": lambda: table_1(preset, chosen),
        "table-2": lambda: table_2(preset, chosen),
    }
    built = builders[name]()
    folders = {name: _folder_of(name, data) for name in {setting.spec.data for setting in built.settings}}
    settings = tuple(replace(s, spec=replace(s.spec, data_folder=folders[s.spec.data])) for s in built.settings)
    return replace(built, settings=settings, seeds=built.seeds if seeds is None or name == "search" else seeds)


def _folder_of(name: str, folder: Path | None) -> str | None:
    """Where a data set's files lie, if not on the hub."""
    if folder is None or name == "digits":
        return None
    inside = folder / name
    if inside.is_dir():
        return str(inside.resolve())
    if not list(folder.glob("train-*.parquet")):
        raise FlatminimaError(f"{folder} holds neither a folder {name} nor train-*.parquet: give the folder of {name}")
    classes = load_data(str(folder))[0].num_classes
    if classes != _CLASSES[name]:
        raise FlatminimaError(f"{folder} has {classes} classes, not {name}'s {_CLASSES[name]}: name a folder of both")
    return str(folder.resolve())
