"""The regularizer in a training loop written with Hugging Face Accelerate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flatminima.errors import FlatminimaError
from flatminima.network import Inputs
from flatminima.regularizer import FisherTraceRegularizer, LossFunction

_ENGINES_WITH_THEIR_OWN_BACKWARD = ("DEEPSPEED", "MEGATRON_LM")


def backward(
    accelerator: Any,
    regularizer: FisherTraceRegularizer,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
) -> Tensor:
    """Replaces the forward pass and ``accelerator.backward(loss)``.

    Mixed precision, gradient scaling and accumulation are the accelerator's: inside ``accelerator.accumulate(model)``
    every micro-batch counts 1/``gradient_accumulation_steps``. Call ``optimizer.zero_grad()`` after the step: before
    the last micro-batch it would clear the gradients of the others. Clip with ``max_grad_norm`` of the regularizer, not
    with ``accelerator.clip_grad_norm_``. ``accelerator.register_for_checkpointing(regularizer)`` makes resuming exact.
    Under FSDP2 every micro-batch with a penalty reduces its gradients.

    Args:
        accelerator: the loop's ``accelerate.Accelerator``.
        regularizer: made with the model that ``accelerator.prepare`` returned.
        loss_fn: as in :meth:`flatminima.FisherTraceRegularizer.backward`.
        inputs: as there; ``lambda output, _: output.loss`` and the whole batch fit models of Hugging Face.
        targets: as there.

    Returns:
        The main loss, detached.

    Raises:
        FlatminimaError: as there, and for DeepSpeed, Megatron-LM and FSDP1.
    """
    engine = accelerator.distributed_type.value
    if engine in _ENGINES_WITH_THEIR_OWN_BACKWARD:
        raise FlatminimaError(f"{engine} is not supported: use DistributedDataParallel or FSDP2")
    if engine == "FSDP" and not accelerator.is_fsdp2:
        raise FlatminimaError("FSDP1 is not supported: pass FullyShardedDataParallelPlugin(fsdp_version=2)")
    return regularizer.backward(
        loss_fn,
        inputs,
        targets,
        weight=1 / accelerator.gradient_accumulation_steps,
        last=accelerator.sync_gradients,
        scaler=accelerator.scaler,
    )
