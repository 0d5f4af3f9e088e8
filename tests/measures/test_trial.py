"""What a trial refuses to tell, and how it splits its samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flatminima.errors import UndefinedMeasureError
from flatminima.measures import CATALOGUE, Trial
from support.minima import fitted
from support.trials import trial_of


def trial(**options: object) -> Trial:
    return trial_of(*fitted(1e-2), subset_size=6, **options)


@pytest.mark.parametrize("name", ["fisher_rao_norm", "weight_alignment", "relative_flatness"])
def test_measures_of_the_weights_are_refused_where_no_process_has_them_whole(name: str) -> None:
    sharded = dataclasses.replace(trial(), sharded=True)
    with pytest.raises(UndefinedMeasureError, match="it needs the weights whole"):
        CATALOGUE[name].of(sharded)


def test_chunks_hold_every_sample_once_and_no_more_than_fit() -> None:
    whole = trial()
    for at_once, sizes in ((4, [4, 2]), (6, [6]), (100, [6]), (1, [1] * 6)):
        chunks = dataclasses.replace(whole, samples_at_once=at_once).chunks
        assert [chunk.stop - chunk.start for chunk in chunks] == sizes
        assert torch.equal(torch.cat([torch.arange(6)[chunk] for chunk in chunks]), torch.arange(6))


def test_the_adaptive_gram_matrix_is_the_trials_own_where_gradients_are_scale_invariant() -> None:
    plain, invariant = trial(), trial(scale_invariant=True)
    assert invariant.adaptive_gram is invariant.gram
    torch.testing.assert_close(plain.adaptive_gram.unit, invariant.gram.unit)
    assert not torch.allclose(plain.gram.unit, invariant.gram.unit)


def test_class_logits_are_those_of_the_subset_in_float64() -> None:
    split = dataclasses.replace(trial(), samples_at_once=4)
    torch.testing.assert_close(split.class_logits, split.model(split.inputs).detach())
    assert split.class_logits.dtype == torch.float64
