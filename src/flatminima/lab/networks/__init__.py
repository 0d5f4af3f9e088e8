"""The paper's networks, other people's, and checkpoints of both."""

from flatminima.lab.networks.checkpoints import assign_weights, load_weights
from flatminima.lab.networks.foreign import imported, load_model, resolve_device
from flatminima.lab.networks.paper import MODEL_NAMES, build_model, network

__all__ = [
    "MODEL_NAMES",
    "assign_weights",
    "build_model",
    "imported",
    "load_model",
    "load_weights",
    "network",
    "resolve_device",
]
