"""A user's own data: each kind of source is a file with one registered opener."""

from flatminima.lab.data.own import arrays, factories, hugging_face, image_folders
from flatminima.lab.data.own.opening import open_data, open_test_data
from flatminima.lab.data.own.registry import KINDS, Opened, SourceKind, source_kind

__all__ = [
    "KINDS",
    "Opened",
    "SourceKind",
    "arrays",
    "factories",
    "hugging_face",
    "image_folders",
    "open_data",
    "open_test_data",
    "source_kind",
]
