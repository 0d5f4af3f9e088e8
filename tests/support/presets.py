"""The smallest sizes in which the paper's experiments can be run from end to end."""

from __future__ import annotations

from dataclasses import replace

from flatminima.lab.experiments.presets import PRESETS, Preset
from flatminima.lab.runs import Measuring, RunSpec


def tiny_preset(run: RunSpec, network: RunSpec, *, images: int, subset_size: int, trials: int) -> Preset:
    """That of the digits with two settings of scenario I, a grid of two, and no ways of training but the paper's.

    Args:
        run: of the scenarios.
        network: of the tables and the search.
        images: of scenario I, with as many random labels beside them or none.
        subset_size: of the measures.
        trials: of the measures.
    """
    return replace(
        PRESETS["digits"],
        scenario=run,
        augmented=run,
        confusion=(0, images),
        clean_images=images,
        networks={"MLP, digits": network},
        measured=("MLP, digits",),
        betas=(10, 20),
        sub_batches=(5,),
        clipping=(5,),
        rivals={},
        every=(),
        measuring=Measuring(subset_size=subset_size, trials=trials, robustness_samples=2, on_singular="skip"),
    )
