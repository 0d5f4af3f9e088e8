"""The paper's experiments (Jia & Su, Sec. 7, App. E), each as an :class:`~flatminima.lab.experiments.Experiment`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from flatminima.errors import FlatminimaError
from flatminima.lab.data import load_data
from flatminima.lab.experiments.experiment import NORMALIZED, Experiment, Setting
from flatminima.lab.experiments.presets import Preset
from flatminima.lab.experiments.summary import RIVALS
from flatminima.lab.runs import RegularizerSpec, RunSpec, SharpnessAwareSpec

PLAIN, REGULARIZED, EXACT, SAM, MATCHED = "plain", "+reg", "+reg, hvp", "SAM", "plain, equal cost"
"""The ways of training in Table 1 of every preset, beside its rivals; the paper has the first two."""

MATCHED_COST = 3
"""Forward-backwards of a regularized update in plain ones: how much longer plain training gets at equal cost."""

FIGURE = ("test_error", *RIVALS, "fisher_trace", "train_loss")
"""What is drawn over the settings of a scenario: the paper's figures, and two more."""

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

Winners: TypeAlias = Mapping[str, RegularizerSpec]
"""What the search has chosen, by case; empty before it."""

Builder: TypeAlias = Callable[[Preset, Winners], Experiment]

EXPERIMENTS: dict[str, Builder] = {}
"""Every registered experiment by name, in the order in which each finds what it needs."""


def registered(name: str) -> Callable[[Builder], Builder]:
    """Register an experiment; that is all it takes to add one.

    The command line's names, ``all`` and its order, and the pages follow. What is decorated makes of a preset's sizes,
    and of what the search has chosen, an :class:`~flatminima.lab.experiments.Experiment`: settings, how minima are
    measured, which question they answer.
    """

    def enter(build: Builder) -> Builder:
        @functools.wraps(build)
        def named(preset: Preset, chosen: Winners) -> Experiment:
            return replace(build(preset, chosen), name=name)

        EXPERIMENTS[name] = named
        return named

    return enter


@registered("search")
def search(preset: Preset, _: Winners) -> Experiment:
    """The grid of Sec. 7.2: β, M and τ by the error on held-out training images."""
    return Experiment(
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
        seeds=(preset.search_seed,),
        quantity="validation_error",
    )


@registered("scenario-1")
def scenario_1(preset: Preset, _: Winners) -> Experiment:
    """Figure 1: minima told apart by the size of a confusion set."""
    base = replace(preset.scenario, train_size=preset.clean_images)
    return Experiment(
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
        drawn=FIGURE,
        captured={"log_det_fisher": True, "spectral_radius": True, "frobenius_norm": True, "robustness": False},
    )


@registered("scenario-2")
def scenario_2(preset: Preset, _: Winners) -> Experiment:
    """Figure 2: minima told apart by the augmentation they were trained with."""
    return Experiment(
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
        drawn=FIGURE,
        captured={"log_det_fisher": True, "spectral_radius": False, "frobenius_norm": False, "robustness": False},
    )


@registered("scenario-3")
def scenario_3(preset: Preset, _: Winners) -> Experiment:
    """Figure 3: minima told apart by the batch size they were trained with."""
    return Experiment(
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
        drawn=FIGURE,
        captured={"log_det_fisher": True, "spectral_radius": True, "frobenius_norm": True, "robustness": False},
    )


_RIVALS = (
    "Further: a penalty on the gradient's norm (Zhao et al. 2022), the Fisher penalty (Jastrzębski et al. 2021), and "
    "Algorithm 1 at unit residuals, which is ours and exploratory; each with the best of a few weights on held-out "
    "images, at a seed that is not reported. "
)


@registered("table-1")
def table_1(preset: Preset, chosen: Winners) -> Experiment:
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
            *(
                Setting(case, f"{REGULARIZED}, every={k}", replace(plain, regularizer=replace(regularizer, every=k)))
                for k in preset.every
            ),
            *(
                Setting(case, arm, replace(plain, regularizer=rival))
                for arm, rival in preset.rivals.get(case, {}).items()
            ),
        ]
    searched = [case for case in preset.networks if case in chosen]
    return Experiment(
        title="Table 1: test errors with and without the regularizer",
        question=(
            "Does training with the regularizer (+reg, Algorithm 1) lower the test error? In the paper it does for "
            "every network. Beside it, and not in the paper: the same penalty by exact Hessian-vector products (hvp), "
            f"SAM with its usual ρ = {SharpnessAwareSpec.rho}, and plain training that is {MATCHED_COST} times as long "
            "and so costs as much. "
            + _how_rarely(preset)
            + (_RIVALS if preset.rivals else "")
            + _how_chosen(preset, searched)
        ),
        answers="comparison",
        contrast=(REGULARIZED, PLAIN),
        factor="network, data",
        settings=tuple(settings),
        measuring=None,
        published={
            (case, arm): numbers
            for case, pair in _PAPERS_TABLE_1.items()
            for arm, numbers in zip((PLAIN, REGULARIZED), pair, strict=True)
        },
    )


@registered("table-2")
def table_2(preset: Preset, chosen: Winners) -> Experiment:
    """Table 2: γ̂ with and without the regularizer; the runs are those of Table 1."""
    settings = tuple(
        setting
        for setting in table_1(preset, chosen).settings
        if setting.case in preset.measured and setting.arm in (PLAIN, REGULARIZED)
    )
    return Experiment(
        title="Table 2: γ̂ with and without the regularizer",
        question=(
            "Does the regularizer lead to minima with a smaller γ̂, as it should if that is why it works? In the paper "
            "it does. As training losses differ, γ̂ is taken at normalized logits, z / (0.04 ‖z‖), as in the authors' "
            "code."
        ),
        answers="comparison",
        contrast=(REGULARIZED, PLAIN),
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


def _how_rarely(preset: Preset) -> str:
    said = [
        f"With every={k} the penalty comes at every {k}th update alone, {k} times as strong. " for k in preset.every
    ]
    return "".join(said)


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
"""Of the data sets that a folder of files can stand for."""


def build_experiment(
    name: str,
    preset: Preset,
    *,
    chosen: Winners,
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
    built = EXPERIMENTS[name](preset, chosen)
    folders = {name: _folder_of(name, data) for name in {setting.spec.data for setting in built.settings}}
    settings = tuple(replace(s, spec=replace(s.spec, data_folder=folders[s.spec.data])) for s in built.settings)
    return replace(built, settings=settings, seeds=built.seeds if seeds is None or name == "search" else seeds)


def _folder_of(name: str, folder: Path | None) -> str | None:
    """Where a data set's files lie, if not on the hub."""
    if folder is None or name not in _CLASSES:
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
