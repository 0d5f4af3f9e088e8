"""The paper's networks, other people's, and checkpoints of both."""

from flatminima.lab.networks import hugging_face, timm_networks
from flatminima.lab.networks.checkpoints import assign_weights, load_weights
from flatminima.lab.networks.foreign import (
    OpenedNetwork,
    inputs_of,
    is_model_source,
    new_network,
    open_network,
    resolve_device,
)
from flatminima.lab.networks.kinds import MODEL_KINDS, ModelKind, is_factory
from flatminima.lab.networks.paper import MODEL_NAMES, build_model, network

__all__ = [
    "MODEL_KINDS",
    "MODEL_NAMES",
    "ModelKind",
    "OpenedNetwork",
    "assign_weights",
    "build_model",
    "hugging_face",
    "inputs_of",
    "is_factory",
    "is_model_source",
    "load_weights",
    "network",
    "new_network",
    "open_network",
    "resolve_device",
    "timm_networks",
]
