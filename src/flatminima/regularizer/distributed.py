"""Several processes. The penalty's passes stay within one; the main pass exchanges gradients as usual.

Under FSDP2 the penalty's passes run at gathered weights, which every process may then move in its own direction. Their
gradients belong to the gathered parameters, and the main pass reduces these to shards together with its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.network import replaced_forward, this_process_statistics
from flatminima.parallel import data_parallel, fsdp_modules, is_sharded, outermost_fsdp_modules, processes_of
from flatminima.torch_compat import hand_on_buffers, has_reshard_switches


@contextmanager
def this_process_alone(model: nn.Module) -> Iterator[None]:
    """No communication in forward: DDP hands through to its module, SyncBatchNorm uses this process's statistics.

    So processes may split uneven batches into different numbers of sub-batches without waiting for each other forever.
    """
    with ExitStack() as stack:
        stack.enter_context(this_process_statistics(model))
        for module in model.modules():
            parallel = data_parallel(module)
            if parallel is not None:  # compiled around DDP, the exchanges are in the graph: it is not run at all
                stack.enter_context(replaced_forward(module, parallel.module.__call__))
        yield


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """FSDP2: all weights gathered, passes without communication, and FSDP2's defaults from there on."""
    modules = fsdp_modules(model)
    if not modules:
        yield
        return
    outermost = outermost_fsdp_modules(model)
    refuse_other_sharding(model)  # again, as frameworks shard a model in place
    for module in modules:
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
    accumulated: list[tuple[Tensor, Tensor | None]] = []
    try:
        for module in modules:
            module.unshard()
        accumulated += [(p, p.grad) for p in model.parameters()]
        for parameter, _ in accumulated:  # of earlier micro-batches: FSDP2 would take them for these passes' own
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in accumulated:
            parameter.grad = gradient
        for module in modules:
            module.reshard()
            module.set_requires_gradient_sync(True, recurse=False)
            module.set_reshard_after_forward(module not in outermost, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)


def refuse_other_sharding(model: nn.Module) -> None:
    """Raise :class:`FlatminimaError` for a sharded model unless ``fully_shard`` holds all that is trained."""
    if processes_of(model).group is None:
        return
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and not is_sharded(p)]
    if left_out:
        raise FlatminimaError(
            f"fully_shard must hold all that is trained, also {left_out[0]}: "
            "call it on the model itself after its parts, without ignored_params"
        )
    if not has_reshard_switches(fsdp_modules(model)[0]):
        raise FlatminimaError("training under fully_shard needs a newer torch: this has no set_reshard_after_forward")


def exchange(model: nn.Module, *, wanted: bool) -> AbstractContextManager[Any]:
    """Let the main pass exchange gradients between processes, or not."""
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(wanted, recurse=False)
    parallel = data_parallel(model)
    return nullcontext() if wanted or parallel is None else parallel.no_sync()


@contextmanager
def in_place_of_main_forward(model: nn.Module, *, exchanged: bool) -> Iterator[None]:
    """Hand on the first process's buffers where DDP's forward, which else does it, does not run.

    Args:
        model: the model; nothing is done for one that is not DDP's.
        exchanged: whether gradients are exchanged next. DDP hands buffers on before the first forward after that.
    """
    parallel = data_parallel(model)
    if parallel is not None:
        hand_on_buffers(parallel)
    yield
    if parallel is not None:
        parallel.require_forward_param_sync = exchanged


def average_gradients(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """The exchange of gradients where the main pass, which else does it, did not run.

    As after DDP's own, a parameter without a gradient on any process has none, and one that DDP was told to ignore
    keeps its process's own.

    Args:
        model: the model; nothing is done for one that is neither DDP's nor FSDP2's.
        parameters: by name, those whose ``.grad`` the penalty's passes have filled.
    """
    if fsdp_modules(model):
        _reduce_to_shards(model, parameters)
    parallel = data_parallel(model)
    if parallel is None:
        return
    ignored = {id(p) for name, p in parallel.module.named_parameters() if name in parallel.parameters_to_ignore}
    exchanged = [parameter for parameter in parameters.values() if id(parameter) not in ignored]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in exchanged]
    having = torch.tensor([p.grad is not None for p in exchanged], device="cpu").to(gradients[0])
    joined = torch.cat([*(gradient.flatten() for gradient in gradients), having])  # one exchange for both
    dist.all_reduce(joined, group=parallel.process_group)
    joined /= dist.get_world_size(parallel.process_group)
    *parts, having = torch.split(joined, [*(gradient.numel() for gradient in gradients), len(exchanged)])
    for i, (parameter, gradient, part) in enumerate(zip(exchanged, gradients, parts, strict=True)):
        if parameter.grad is None and not having[i]:
            continue
        is_sparse = parameter.grad is not None and parameter.grad.is_sparse
        parameter.grad = part.view_as(gradient).to_sparse(1) if is_sparse else gradient.copy_(part.view_as(gradient))


def _reduce_to_shards(model: nn.Module, gathered: dict[str, Tensor]) -> None:
    """Move the gradients of gathered parameters to the sharded ones, averaged over processes."""
    from torch.distributed.tensor import DTensor, Partial

    for name, sharded in model.named_parameters():
        if name not in gathered:
            continue
        whole = gathered[name]
        own = torch.zeros_like(whole) if whole.grad is None else whole.grad
        whole.grad = None
        mesh, placements = sharded.device_mesh, sharded.placements  # type: ignore[attr-defined]
        summed = DTensor.from_local(own / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
        gradient = summed.redistribute(placements=placements)
        sharded.grad = gradient if sharded.grad is None else sharded.grad + gradient
