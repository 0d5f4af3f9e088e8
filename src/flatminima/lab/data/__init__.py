"""Image data: where they come from, augmentation, held-out and confusion sets."""

from flatminima.lab.data.augmentation import augment, confuse, hold_out
from flatminima.lab.data.cache import Decoded
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.normalization import NORMALIZATIONS, Normalization
from flatminima.lab.data.sources import data_set, hub_data_set, load_data
from flatminima.lab.names import AUGMENTATIONS

__all__ = [
    "AUGMENTATIONS",
    "NORMALIZATIONS",
    "Decoded",
    "ImageSet",
    "Normalization",
    "augment",
    "confuse",
    "data_set",
    "hold_out",
    "hub_data_set",
    "load_data",
]
