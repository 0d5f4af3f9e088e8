"""Data: where they come from, augmentation, held-out and confusion sets; a user's own (``own``)."""

from flatminima.lab.data.augmentation import augment, confuse, hold_out
from flatminima.lab.data.cache import Decoded
from flatminima.lab.data.contents import digest_of_data
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.normalization import FROM_DATA, NORMALIZATIONS, Normalization
from flatminima.lab.data.own import open_data, open_test_data
from flatminima.lab.data.pictures import Pictures, as_pictures
from flatminima.lab.data.ready import OwnData, Preparation, Prepared, ReadySamples, TrainingData
from flatminima.lab.data.sources import data_set, hub_data_set, load_data
from flatminima.lab.data.texts import Texts
from flatminima.lab.names import AUGMENTATIONS

__all__ = [
    "AUGMENTATIONS",
    "FROM_DATA",
    "NORMALIZATIONS",
    "Decoded",
    "ImageSet",
    "Normalization",
    "OwnData",
    "Pictures",
    "Preparation",
    "Prepared",
    "ReadySamples",
    "Texts",
    "TrainingData",
    "as_pictures",
    "augment",
    "confuse",
    "data_set",
    "digest_of_data",
    "hold_out",
    "hub_data_set",
    "load_data",
    "open_data",
    "open_test_data",
]
