"""What is done to a model and its data from outside."""

from flatminima.network.batches import (
    Inputs,
    batch_size,
    call_model,
    call_model_without_graph,
    device_of,
    map_tensors,
    replaced_forward,
    run_model,
    take,
    taker,
    tensors_of,
    to_device,
)
from flatminima.network.batchnorm import (
    BatchStatistics,
    batch_statistics,
    chunk_statistics,
    sound_batchnorm,
    this_process_statistics,
)
from flatminima.network.digests import add_state, add_tensor
from flatminima.network.generators import Generators, restored_generators
from flatminima.network.interruption import Before, undone_if_interrupted
from flatminima.network.kept import depended_on, listed, refusing_kept_graphs, warn_unused
from flatminima.network.modes import (
    Buffers,
    differentiating,
    evaluating,
    frozen,
    moved,
    without_autocast,
)
from flatminima.network.precision import (
    PENALTIES_NEED_FLOAT32,
    RefusedAutocast,
    back_like,
    float32_products,
    float64_device,
    in_float64,
    outside_autocast,
    true_precision,
)
from flatminima.network.requirements import require_module, require_usable, require_values
from flatminima.network.rounding import rounded_otherwise
from flatminima.network.samples import (
    Data,
    Samples,
    SamplesOfModel,
    explained_errors,
    index_batches,
    model_inputs,
    samples_of,
)
from flatminima.network.surroundings import undisturbed

__all__ = [
    "PENALTIES_NEED_FLOAT32",
    "BatchStatistics",
    "Before",
    "Buffers",
    "Data",
    "Generators",
    "Inputs",
    "RefusedAutocast",
    "Samples",
    "SamplesOfModel",
    "add_state",
    "add_tensor",
    "back_like",
    "batch_size",
    "batch_statistics",
    "call_model",
    "call_model_without_graph",
    "chunk_statistics",
    "depended_on",
    "device_of",
    "differentiating",
    "evaluating",
    "explained_errors",
    "float32_products",
    "float64_device",
    "frozen",
    "in_float64",
    "index_batches",
    "listed",
    "map_tensors",
    "model_inputs",
    "moved",
    "outside_autocast",
    "refusing_kept_graphs",
    "replaced_forward",
    "require_module",
    "require_usable",
    "require_values",
    "restored_generators",
    "rounded_otherwise",
    "run_model",
    "samples_of",
    "sound_batchnorm",
    "take",
    "taker",
    "tensors_of",
    "this_process_statistics",
    "to_device",
    "true_precision",
    "undisturbed",
    "undone_if_interrupted",
    "warn_unused",
    "without_autocast",
]
