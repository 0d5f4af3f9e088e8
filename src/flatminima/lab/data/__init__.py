"""Image data: where they come from, augmentation, held-out and confusion sets."""

from flatminima.lab.data.augmentation import AUGMENTATIONS, augment, confuse, hold_out
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.sources import load_data

__all__ = ["AUGMENTATIONS", "ImageSet", "augment", "confuse", "hold_out", "load_data"]
