"""The gallery's order: from measuring over training to what a user adds."""

from __future__ import annotations

ORDER = (
    "measure_and_compare.py",
    "train_under_label_noise.py",
    "train_like_timm.py",
    "train_with_lightning.py",
    "train_with_transformers.py",
    "train_with_accelerate.py",
    "follow_a_training.py",
    "look_around_minima.py",
    "measure_adapters.py",
    "write_your_own_measure.py",
    "write_a_rule.py",
    "judge_measures.py",
)


class GalleryOrder:
    """A key for sorting; programs that are not listed come last."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, name: str) -> tuple[int, str]:
        """The place of a file."""
        return (ORDER.index(name) if name in ORDER else len(ORDER), name)
