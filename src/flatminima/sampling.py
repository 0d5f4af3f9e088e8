"""Which samples the trials of a measure are on, for those who want to look at them or repeat one."""

from __future__ import annotations

import torch

from flatminima.errors import FlatminimaError, require_integer, require_seed


def draw_subsets(num_samples: int, subset_size: int, trials: int, seed: int) -> list[list[int]]:
    """``trials`` subsets of ``subset_size`` distinct indices below ``num_samples``; the same for the same arguments.

    Trial t of :func:`~flatminima.measure` is on ``draw_subsets(...)[t]``, and the same whatever ``trials`` is.

    Args:
        num_samples: N, the size of the data set.
        subset_size: N'.
        trials: T.
        seed: as passed to :func:`~flatminima.measure` (default there: 0).

    Raises:
        FlatminimaError: if there are fewer samples than ``subset_size``, or an argument is not positive.

    Example:
        >>> draw_subsets(50, subset_size=3, trials=2, seed=0) == draw_subsets(50, subset_size=3, trials=9, seed=0)[:2]
        True
    """
    for name, value in {"num_samples": num_samples, "subset_size": subset_size, "trials": trials}.items():
        require_integer(name, value)
    require_seed(seed)
    if subset_size < 1 or trials < 1:
        raise FlatminimaError(f"subset_size and trials must be at least 1, got {subset_size} and {trials}")
    if num_samples < subset_size:
        raise FlatminimaError(
            f"the data set has {num_samples} samples, fewer than subset_size={subset_size}: "
            "lower subset_size or pass more data"
        )
    generator = torch.Generator("cpu").manual_seed(int(seed))  # numpy's integers are none to it
    return [
        torch.randperm(num_samples, generator=generator, device="cpu")[:subset_size].tolist() for _ in range(trials)
    ]
