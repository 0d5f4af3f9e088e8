"""Every touch of what PyTorch does not document or has changed between versions (2.6 and newer), in one place.

Each has its reason beside it, and a test in ``tests/test_torch_compat.py`` that fails when PyTorch changes it.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import batchnorm
from torch.utils import checkpoint as checkpoints
from torch.utils import weak

# Classes.

BatchNorm = batchnorm._BatchNorm
"""The one class of all BatchNorm layers, SyncBatchNorm's too."""

CustomFunctionNode = function.BackwardCFunction
"""What a custom ``autograd.Function`` leaves in the autograd graph."""

TensorWeakRef: Any = weak.TensorWeakRef
"""A reference that does not keep a tensor alive and, unlike ``weakref``, survives that of Python's object for it."""

# Tensors. Plain aliases, for they are on hot paths.

foreach_add = torch._foreach_add
"""Elementwise operations on lists of tensors in a few launches, as torch's own optimizers have them."""
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_mul = torch._foreach_mul
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor has been written to in place: autograd's own counter."""

gradient_hooks: Callable[[Tensor], Any] = attrgetter("_backward_hooks")
"""What is to see, and may change, every gradient of the tensor (``register_hook``); None or empty without any."""

post_accumulate_hooks: Callable[[Tensor], Any] = attrgetter("_post_accumulate_grad_hooks")
"""What is to run whenever a backward pass has accumulated in the tensor's ``.grad``; None or empty without any."""

is_view: Callable[[Tensor], bool] = Tensor._is_view
"""Whether autograd sees a tensor as a view of another."""

base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")
"""The tensor that a view shows; None for one that is no view."""

make_dual: Callable[..., Any] = torch._make_dual
"""By which forward-mode derivatives begin; ``torch.autograd.forward_ad.make_dual`` is not seen by function modes."""

# Operators that no public function calls in the same way.

batch_norm_backward: Any = torch.ops.aten.native_batch_norm_backward
"""BatchNorm's backward pass alone, from statistics that are given."""

convolution_backward: Any = torch.ops.aten.convolution_backward
"""A convolution's backward pass alone, without a forward pass before it."""

HAS_ONEDNN_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether :func:`onednn_linear` is there: it is Inductor's, and builds without oneDNN have none."""


def onednn_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """``inputs weightᵀ`` by oneDNN, where ``torch.nn.functional.linear`` would call BLAS."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return product


# The autograd graph.


def gradient_types(node: Any) -> set[torch.dtype]:
    """The types of the gradients that a node of the autograd graph takes: those of its outputs in the forward pass."""
    return {metadata.dtype for metadata in getattr(node, "_input_metadata", ())}


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """Let ``checkpoint(..., use_reentrant=True)`` be the other variant: this one runs under ``backward()`` alone.

    Both compute the same. Where no argument requires a gradient, the reentrant variant has none for the weights inside,
    and so has this.
    """
    with _checkpoints_as({"CheckpointFunction": _Checkpoint}):
        yield


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Let ``checkpoint(...)`` be a plain call of the function: what watches a forward pass must not see it twice."""
    with _checkpoints_as({"CheckpointFunction": _PlainCall, _GENERATOR: _nothing_around_it}):
        yield


CheckpointVariant = tuple[int, dict[str, Any]]

_GENERATOR = "_checkpoint_without_reentrant_generator"
_OWN = {name: getattr(checkpoints, name) for name in ("CheckpointFunction", _GENERATOR)}
_VARIANTS: list[CheckpointVariant] = []
"""Those of all contexts that are open, with the thread of each; the last is in use, or PyTorch's own without any."""


@contextmanager
def _checkpoints_as(replacements: dict[str, Any]) -> Iterator[None]:
    variant = (threading.get_ident(), {**_OWN, **replacements})
    try:
        _VARIANTS.append(variant)
        _use_last_variant()
        yield
    finally:
        _VARIANTS[:] = [other for other in _VARIANTS if other is not variant]
        _use_last_variant()


def _use_last_variant() -> None:
    for name, value in (_VARIANTS[-1][1] if _VARIANTS else _OWN).items():
        setattr(checkpoints, name, value)


def _nothing_around_it(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _PlainCall:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def checkpoint_variants() -> list[CheckpointVariant]:
    """What this thread lets checkpoints run at present, for :func:`restore_checkpoint_variants`."""
    return [variant for variant in _VARIANTS if variant[0] == threading.get_ident()]


def restore_checkpoint_variants(variants: list[CheckpointVariant]) -> None:
    """Leave the contexts that this thread has opened since: an interruption inside a context's exit leaves it open."""
    others = [variant for variant in _VARIANTS if variant[0] != threading.get_ident()]
    _VARIANTS[:] = variants + others
    _use_last_variant()


class _Checkpoint:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not any(isinstance(argument, Tensor) and argument.requires_grad for argument in args):
            with torch.no_grad():
                return function(*args)
        return checkpoints.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, determinism_check="none"
        )


# Modules.


def own_parameters(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """The mapping in which a module holds its parameters, children's left out; written to by :func:`hold`."""
    return module._parameters


def own_buffers(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """The mapping in which a module holds its buffers; ``named_buffers`` gives no more than a copy of it."""
    return module._buffers


def hold(held: MutableMapping[str, Any], values: Mapping[str, Any]) -> None:
    """Put values into such a mapping. TorchScript's takes them one by one, and the same ones again not always."""
    for name, value in values.items():
        if name not in held or held[name] is not value:
            held[name] = value


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The dictionary in which a module holds its forward pre-hooks; it can be written to."""
    return module._forward_pre_hooks


def scripted_batch_norms(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers that are TorchScript's, which says by a name alone what a module was."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    return [name for name, module in modules if "BatchNorm" in getattr(module, "original_name", "")]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside that which ``torch.compile(model)`` returns; any other module is returned as it is."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


# torch.compile. Importing dynamo takes a second or more, so it is left to those who compile.


def eager_stance() -> AbstractContextManager[None]:
    """A context in which compiled models run eagerly: graphs have no second derivative, nor a rule for ``vmap``."""
    in_use = "torch._dynamo" in sys.modules  # else nothing is compiled
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager") if in_use else nullcontext()
    return stance


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """A context for forward passes: what is compiled or fused (attention) has no second derivative or forward mode."""
    with eager_stance(), sdpa_kernel(SDPBackend.MATH):
        yield


def compiler_stance() -> Any:
    """How compiled models run at present, for :func:`restore_compiler_stance`; None before anything is compiled."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    return None if dynamo is None else dynamo._stance


def restore_compiler_stance(stance: Any) -> None:
    """Go back to a :func:`compiler_stance`: an interruption within :func:`eager_stance` can leave it in force."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:
        dynamo._stance = dynamo.DynamoStance() if stance is None else stance


def dynamo_error() -> type[Exception]:
    """What ``torch.compile(..., fullgraph=True)`` raises for a function that it cannot trace."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def reason_for_no_graph(error: Exception) -> str | None:
    """What the traced function itself has raised, if that is what a :func:`dynamo_error` reports (not in 2.6)."""
    raised = re.search("raised exception (.+)", str(error))
    return raised[1] if raised else None


# What errors say that have no type of their own.


def needs_more_than_one_sample(error: ValueError) -> bool:
    """Whether BatchNorm has refused a batch with one value per channel."""
    return "more than 1 value per channel" in str(error)


def cannot_be_vectorized(error: RuntimeError | ValueError) -> bool:
    """Whether ``torch.func.vmap`` has met an operation that it has no rule for."""
    return re.search("vmap|functorch|batching rule|sparse", str(error), re.IGNORECASE) is not None


def has_no_derivative(error: RuntimeError) -> bool:
    """Whether autograd has met an operation without a derivative."""
    return "not implemented" in str(error)


def lacks_a_graph(error: RuntimeError) -> bool:
    """Whether a derivative was asked for where gradients are not recorded."""
    return "does not require grad" in str(error)


def meets_a_freed_graph(error: RuntimeError) -> bool:
    """Whether a backward pass came to a part of the graph that an earlier one has gone through and freed."""
    return "backward through the graph a second time" in str(error)


def hides_what_is_saved(error: RuntimeError) -> bool:
    """Whether derivatives by ``torch.func`` have met hooks on what autograd saves: some of these fail then."""
    return re.search("saved tensor hooks|invalid python storage", str(error)) is not None


def raises_when_differentiated(node: Any) -> bool:
    """Whether a node of the autograd graph stands behind a function marked ``once_differentiable``."""
    return str(node.name()).endswith("Error")


def has_wrong_second_derivative(node: Any) -> bool:
    """Whether a node of the autograd graph is one that PyTorch (2.13, CPU) differentiates twice to a wrong result.

    Of the fused weight normalization, the derivative of v's gradient lacks terms.
    """
    return str(node.name()).startswith("WeightNormInterface")


def graph_of(results: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph that ``results`` come from."""
    seen: set[Any] = {None}
    waiting: list[Any] = [result.grad_fn for result in results]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def leaves_of(result: Tensor) -> list[Tensor]:
    """The tensors in whose ``.grad`` the backward pass from ``result`` would accumulate."""
    return [node.variable for node in graph_of([result]) if node.name() == "torch::autograd::AccumulateGrad"]


# Modes.


def function_modes() -> int:
    """How many ``TorchFunctionMode`` are active in this thread."""
    return int(torch._C._len_torch_function_stack())


def leave_function_modes(count: int) -> None:
    """Leave all but the first ``count`` of them, whose own ``__exit__`` an interruption has prevented."""
    while function_modes() > count:
        torch._C._pop_torch_function_stack()


func_levels: Callable[[], int] = torch._C._functorch.get_dynamic_layer_stack_depth
"""How many transforms of ``torch.func`` (``vmap``, say) this thread is in."""


def leave_func_levels(count: int) -> None:
    """Leave all but ``count`` of them, which an interruption has kept from leaving themselves.

    One by one, as the transforms do: torch 2.6's own function for all of them leaves two at a time.
    """
    functorch: Any = torch._C._functorch
    leave = {
        functorch.TransformType.Functionalize: functorch._func_decrement_nesting,
        functorch.TransformType.Grad: functorch._grad_decrement_nesting,
        functorch.TransformType.Jvp: functorch._jvp_decrement_nesting,
        functorch.TransformType.Vmap: functorch._vmap_decrement_nesting,
    }
    while func_levels() > count:
        leave[functorch.peek_interpreter_stack().key()]()


def is_visible_to_function_modes(function: Any) -> bool:
    """Whether a ``TorchFunctionMode`` sees calls of it: PyTorch's own in C, operators, Python that passes them on."""
    if isinstance(function, FunctionType):
        return "handle_torch_function" in function.__code__.co_names
    if isinstance(function, BuiltinFunctionType):
        return (getattr(function, "__module__", None) or "torch").partition(".")[0] == "torch"
    return isinstance(
        function,
        (OpOverload, OpOverloadPacket, MethodDescriptorType, WrapperDescriptorType, MethodWrapperType),
    )


# Precision.


def float32_switches() -> list[tuple[Any, str, Any, Any]]:
    """(object, attribute, exact value, value for TF32) of every switch that trades float32 accuracy for speed.

    The CPU stays exact.

    From 2.9 on PyTorch has one switch per backend and operator, and reading the older ones fails once a user has set
    a newer one; before, there were two.
    """
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        operators = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        mkldnn = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
        return [
            *((operator, "fp32_precision", "ieee", "tf32") for operator in operators),
            *((operator, "fp32_precision", "ieee", "ieee") for operator in mkldnn),
        ]
    return [(backends.cuda.matmul, "allow_tf32", False, True), (backends.cudnn, "allow_tf32", False, True)]


# Several processes.

FSDP_GATHERING_FUNCTIONS = tuple(
    name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)
)
"""The functions of ``torch.distributed`` by which FSDP2 gathers weights, looked up there when it needs them: newer and
older versions call another."""


def process_group_store(group: Any) -> Any:
    """The store in which a process group's processes have met."""
    return dist.distributed_c10d._get_process_group_store(group)


def hand_on_buffers(model: Any) -> None:
    """What ``DistributedDataParallel`` does with buffers before its forward pass, if it is due.

    By default that is to copy those of the first process to all, after every exchange of gradients.
    """
    if model._check_sync_bufs_pre_fwd():
        model._sync_buffers()


def has_reshard_switches(module: Any) -> bool:
    """Whether an FSDP2 module can be told not to reshard after its forward pass, which older versions cannot."""
    return hasattr(module, "set_reshard_after_forward")


def forget_interrupted_pass(module: Any) -> None:
    """Let an outermost FSDP2 module run again after an exception in a pass (torch 2.13 and newer can)."""
    if hasattr(module, "reset_iter_state"):
        with suppress(AttributeError):  # raised before the first pass
            module.reset_iter_state()
