"""A user's own data: each kind of source is a file with one registered opener."""

# In the order in which they are asked: a folder is one of classes if it is nothing else, a name with a colon a factory.
# isort: off
from flatminima.lab.data.own import arrays, hugging_face
from flatminima.lab.data.own.opening import open_data
from flatminima.lab.data.own import image_folders, factories
from flatminima.lab.data.own.registry import KINDS, Opened, SourceKind, source_kind
# isort: on

__all__ = [
    "KINDS",
    "Opened",
    "SourceKind",
    "arrays",
    "factories",
    "hugging_face",
    "image_folders",
    "open_data",
    "source_kind",
]
