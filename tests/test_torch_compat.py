"""Whether PyTorch's undocumented and changing parts are still what :mod:`flatminima.torch_compat` takes them for."""

from __future__ import annotations

import gc
import inspect
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import vmap
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode, wrap_torch_function
from torch.utils.checkpoint import checkpoint

from flatminima import torch_compat
from support.versions import TORCH

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what dynamo imports


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_foreach_operations_do_the_same_as_loops() -> None:
    here, there = [doubles(3), doubles(2, 2)], [doubles(3), doubles(2, 2)]
    expected = {
        "add": [a + 0.5 * b for a, b in zip(here, there, strict=True)],
        "sub": [a - b for a, b in zip(here, there, strict=True)],
        "mul": [a * b for a, b in zip(here, there, strict=True)],
        "scaled": [3.0 * a for a in here],
    }
    found = {
        "add": torch_compat.foreach_add(here, there, alpha=0.5),
        "sub": torch_compat.foreach_sub(here, there),
        "mul": torch_compat.foreach_mul(here, there),
        "scaled": torch_compat.foreach_mul(here, 3.0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(list(found[name]), values, rtol=1e-15, atol=0)
    target = [value.clone() for value in here]
    torch_compat.foreach_add_(target, there, alpha=0.5)
    torch.testing.assert_close(target, expected["add"], rtol=1e-15, atol=0)
    torch_compat.foreach_copy_(target, here)
    assert all(torch.equal(a, b) for a, b in zip(target, here, strict=True))


def test_foreach_operations_take_factors_that_stay_on_the_device() -> None:
    values = [doubles(3)]
    (scaled,) = torch_compat.foreach_mul(values, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(scaled, 3 * values[0], rtol=1e-15, atol=0)


def test_version_counts_what_is_written_in_place() -> None:
    x = torch.zeros(3)
    before = torch_compat.version_of(x)
    x + 1
    assert torch_compat.version_of(x) == before
    x[1:].add_(1)
    assert torch_compat.version_of(x) == before + 1


def test_views_are_told_from_tensors_of_their_own() -> None:
    x = torch.zeros(3, 2)
    assert [torch_compat.is_view(t) for t in (x, x.T, x[1:], x.clone(), x + 1)] == [False, True, True, False, False]


def test_convolutions_backward_pass_alone_is_that_of_autograd() -> None:
    x, weight, gradient = doubles(2, 4, 7, 6), doubles(6, 2, 3, 2).requires_grad_(), doubles(2, 6, 4, 3)
    output = F.conv2d(x, weight, None, (2, 2), (1, 1), (1, 2), 2)
    (expected,) = torch.autograd.grad(output, weight, gradient)
    settings = (None, (2, 2), (1, 1), (1, 2), False, [0, 0], 2, [False, True, False])
    _, found, _ = torch_compat.convolution_backward(gradient, x, torch.empty_like(weight), *settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_batch_norms_backward_pass_alone_is_that_of_autograd() -> None:
    x, gradient, mean, variance = doubles(3, 4, 5), doubles(3, 4, 5), doubles(4), doubles(4).square()
    weight, bias = (doubles(4).requires_grad_() for _ in range(2))
    expected = torch.autograd.grad(F.batch_norm(x, mean, variance, weight, bias), (weight, bias), gradient)
    settings = (None, None, False, 1e-5, [False, True, True])
    _, *found = torch_compat.batch_norm_backward(gradient, x, None, mean, variance, *settings)
    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not torch_compat.HAS_ONEDNN_LINEAR, reason="this torch was built without oneDNN")
def test_onednns_linear_layer_is_a_product_with_the_transpose() -> None:
    x, weight = torch.randn(40, 70), torch.randn(50, 70)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(torch_compat.onednn_linear(x, weight), expected, rtol=1e-4, atol=1e-4)


def test_builds_with_onednn_have_its_linear_layer() -> None:
    assert torch.backends.mkldnn.is_available() == torch_compat.HAS_ONEDNN_LINEAR


def test_modules_look_their_tensors_up_in_the_dictionaries_given() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    assert torch_compat.own_parameters(model) == torch_compat.own_buffers(model) == {}
    assert torch_compat.own_parameters(model[0]) == dict(model[0].named_parameters())
    assert torch_compat.own_buffers(model[1]) == dict(model[1].named_buffers())
    other = torch.ones(2)
    torch_compat.own_buffers(model[1])["running_mean"] = other
    assert model[1].running_mean is other


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("script", [False, True])
def test_modules_hold_what_they_are_given(script: bool) -> None:
    """TorchScript's mappings have neither ``get`` nor ``update``, and take a tensor of the same name alone."""
    layer = torch.jit.script(nn.BatchNorm1d(2)) if script else nn.BatchNorm1d(2)
    held, other = torch_compat.own_buffers(layer), torch.ones(2)
    before = dict(held.items())
    torch_compat.hold(held, {"running_mean": other})
    assert layer.running_mean is other
    torch_compat.hold(held, before)
    assert layer.running_mean is before["running_mean"]
    found = torch_compat.scripted_batch_norms(nn.Sequential(nn.Linear(2, 2), layer))
    assert found == (["1"] if script else [])


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_batch_norm_is_of_one_class(layer: Callable[[int], nn.Module]) -> None:
    assert isinstance(layer(3), torch_compat.BatchNorm)
    assert not isinstance(nn.InstanceNorm1d(3), torch_compat.BatchNorm)


def test_sync_batch_norm_on_its_own_runs_as_batch_norm() -> None:
    x, layer = doubles(4, 3), nn.SyncBatchNorm(3).double()
    expected = nn.BatchNorm1d(3).double()(x)
    torch.testing.assert_close(torch_compat.BatchNorm.forward(layer, x), expected, rtol=1e-14, atol=0)


def test_compiled_models_show_the_module_inside() -> None:
    model = nn.Sequential()  # which is false as a condition
    assert torch_compat.uncompiled(torch.compile(model)) is model
    assert torch_compat.uncompiled(model) is model


def test_eager_stance_runs_compiled_models_without_their_graphs() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append("graph")
            return graph.forward(*args)

        return run

    model = torch.compile(nn.Linear(2, 2), backend=backend)
    model(torch.zeros(1, 2))
    assert calls == ["graph"]
    with torch_compat.eager_stance():
        model(torch.zeros(1, 2))
    assert calls == ["graph"]
    model(torch.zeros(1, 2))
    assert calls == ["graph", "graph"]


@pytest.mark.xfail(
    reason="PyTorch's own fault (2.13, CPU): once mended, has_wrong_second_derivative can go", strict=True
)
def test_pytorch_differentiates_weight_normalization_twice() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)).double()
    x, v = doubles(6, 4), layer.parametrizations.weight.original1

    def gradient() -> Tensor:
        return torch.autograd.grad(torch.tanh(layer(x)).square().sum(), v, create_graph=True)[0]

    direction = torch.randn_like(v)
    (second,) = torch.autograd.grad(gradient(), v, direction)
    sides = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            v += step * direction
        sides.append(gradient().detach())
        with torch.no_grad():
            v -= step * direction
    torch.testing.assert_close(second, (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_compiler_stance_is_gone_back_to() -> None:
    pytest.importorskip("torch._dynamo.eval_frame")
    before = torch_compat.compiler_stance()
    left = torch_compat.eager_stance()  # in force from here on, as an interruption before `with` would leave it
    assert torch_compat.compiler_stance() != before
    torch_compat.restore_compiler_stance(before)
    assert torch_compat.compiler_stance() == before
    del left


def test_nothing_imports_dynamo_before_a_model_is_compiled() -> None:
    code = (
        "import sys; from flatminima import torch_compat\n"
        "with torch_compat.eager_stance(): pass\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.parametrize("raised", [None, ValueError("of ours")])
def test_what_cannot_be_traced_raises_dynamos_error_with_the_reason(raised: Exception | None) -> None:
    def function(x: Tensor) -> Tensor:
        if raised is not None:
            raise ValueError("of ours")
        return x if x.sum() > 0 else 2 * x

    with pytest.raises(torch_compat.dynamo_error()) as caught:
        torch.compile(function, fullgraph=True, backend="eager")(torch.ones(2))
    reason = torch_compat.reason_for_no_graph(caught.value)
    assert reason is None if raised is None or TORCH == (2, 6) else "of ours" in str(reason)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class CubeOnce(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def test_custom_functions_are_seen_in_the_graph() -> None:
    x = doubles(3).requires_grad_()
    kinds = [[isinstance(node, torch_compat.CustomFunctionNode) for node in nodes(y)] for y in (Cube.apply(x), x**3)]
    assert [any(found) for found in kinds] == [True, False]


def nodes(result: Tensor) -> list[Any]:
    """Every node of the autograd graph of a result."""
    found, waiting = [], [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.append(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found


@pytest.mark.parametrize(("function", "expected"), [(Cube, False), (CubeOnce, True)])
def test_gradients_that_have_none_of_their_own_are_seen_in_the_graph(function: Any, expected: bool) -> None:
    x = doubles(3).requires_grad_()
    (gradient,) = torch.autograd.grad(function.apply(x).square().sum(), x, create_graph=True)
    assert any(torch_compat.raises_when_differentiated(node) for node in nodes(gradient)) == expected


def test_the_error_of_batch_norm_on_one_sample_is_told_from_others() -> None:
    with pytest.raises(ValueError, match="per channel") as caught:
        nn.BatchNorm1d(3)(torch.zeros(1, 3))
    assert torch_compat.needs_more_than_one_sample(caught.value)
    assert not torch_compat.needs_more_than_one_sample(ValueError("expected 2D or 3D input (got 1D input)"))


def test_the_error_of_an_operation_without_a_derivative_is_told_from_others() -> None:
    x = torch.randn(2, 3, 4, 4).requires_grad_()
    distances = torch.cdist(x.flatten(2), x.flatten(2))
    (gradient,) = torch.autograd.grad(distances.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(gradient.sum(), x)
    assert torch_compat.has_no_derivative(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(torch.zeros(2), x)
    assert not torch_compat.has_no_derivative(caught.value)


@pytest.mark.parametrize("function", [lambda x: x.sum().item() * x, lambda x: x if x.sum() > 0 else 2 * x, Cube.apply])
def test_the_errors_of_vmap_are_told_from_others(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError) as caught:
        vmap(function)(torch.ones(3, 2))
    assert torch_compat.cannot_be_vectorized(caught.value)
    with pytest.raises(RuntimeError) as caught:
        vmap(lambda x: x @ torch.ones(3))(torch.ones(3, 2))
    assert not torch_compat.cannot_be_vectorized(caught.value)


def test_every_precision_switch_is_there_and_takes_both_of_its_values() -> None:
    for holder, name, exact, fast in torch_compat.float32_switches():
        before = getattr(holder, name)
        try:
            for value in (exact, fast):
                setattr(holder, name, value)
                assert getattr(holder, name) == value
        finally:
            setattr(holder, name, before)


def test_there_is_a_precision_switch_for_each_operator_from_2_9_on() -> None:
    names = [name for _, name, _, _ in torch_compat.float32_switches()]
    assert names == (["fp32_precision"] * 6 if TORCH >= (2, 9) else ["allow_tf32"] * 2)


needs_distributed = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend")


@needs_distributed
def test_the_store_of_a_process_group_is_the_one_its_processes_share() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = torch_compat.process_group_store(dist.group.WORLD)
        found.set("flatminima", "here")
        assert found.get("flatminima") == b"here"
        assert found.add("count", 2) == 2
        assert found.delete_key("count")
        assert isinstance(found, dist.Store)
    finally:
        dist.destroy_process_group()


@needs_distributed
def test_ddp_hands_on_buffers_where_its_forward_would() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(2))
        calls = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group
        exchanges = []
        for is_due in (True, False):
            model.require_forward_param_sync = is_due
            before = calls()
            torch_compat.hand_on_buffers(model)
            exchanges.append(calls() - before)
        assert exchanges[0] > 0
        assert exchanges[1] == 0
    finally:
        dist.destroy_process_group()


@needs_distributed
def test_fsdp2_gathers_by_a_function_that_is_watched() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    source = inspect.getsource(collectives)
    assert collectives.dist is dist
    assert any(f"dist.{name}(" in source for name in torch_compat.FSDP_GATHERING_FUNCTIONS)


@needs_distributed
def test_fsdp2_has_what_newer_versions_are_said_to_have() -> None:
    from torch.distributed.fsdp import FSDPModule

    assert hasattr(FSDPModule, "reset_iter_state") == (TORCH >= (2, 13))
    if torch_compat.has_reshard_switches(FSDPModule):
        assert callable(FSDPModule.set_reshard_after_forward)
    assert torch_compat.has_reshard_switches(FSDPModule) or TORCH < (2, 9)


def test_forgetting_a_pass_is_harmless_before_the_first_one_and_where_it_cannot_be_done() -> None:
    class New:
        forgotten = False

        def reset_iter_state(self) -> None:
            self.forgotten = True

    class Unused:
        def reset_iter_state(self) -> None:
            raise AttributeError("before the first pass")

    module = New()
    for each in (module, Unused(), nn.Linear(1, 1)):
        torch_compat.forget_interrupted_pass(each)
    assert module.forgotten


def test_a_view_knows_the_tensor_that_it_shows() -> None:
    whole = torch.zeros(4)
    assert torch_compat.base_of(whole[1:]) is whole
    assert torch_compat.base_of(whole) is None


def test_reentrant_checkpoints_are_replaced_for_a_while() -> None:
    """They raise under ``torch.autograd.grad``; the other variant computes the same."""
    weight, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return checkpoint(lambda z: torch.tanh(z @ weight), x, use_reentrant=True).sum()

    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        torch.autograd.grad(loss(x), x)
    with torch_compat.without_reentrant_checkpoints():
        (found,) = torch.autograd.grad(loss(x), weight)
        assert not loss(x.detach()).requires_grad  # as the reentrant variant has it
    torch.testing.assert_close(found, torch.autograd.grad(torch.tanh(x @ weight).sum(), weight)[0])
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        torch.autograd.grad(loss(x), x)


def test_graphs_say_which_types_they_go_through() -> None:
    x = torch.randn(3, requires_grad=True)
    assert torch_compat.gradient_types((x.bfloat16() * 2).grad_fn) == {torch.bfloat16}
    assert torch_compat.gradient_types((x * 2).grad_fn) == {torch.float32}


def test_leaves_are_those_that_a_backward_pass_accumulates_in() -> None:
    weight, other, fixed = doubles(3).requires_grad_(), doubles(3).requires_grad_(), doubles(3)
    result = (Cube.apply(weight) * other * other * fixed).sum()
    leaves = torch_compat.leaves_of(result)
    assert sorted(map(id, leaves)) == sorted(map(id, [weight, other]))
    assert torch_compat.leaves_of(fixed.sum()) == []


@pytest.mark.parametrize(
    ("hooks", "register", "others"),
    [
        (torch_compat.gradient_hooks, Tensor.register_hook, torch_compat.post_accumulate_hooks),
        (
            torch_compat.post_accumulate_hooks,
            Tensor.register_post_accumulate_grad_hook,
            torch_compat.gradient_hooks,
        ),
    ],
    ids=["gradients", "accumulation"],
)
def test_hooks_of_a_tensor_are_seen_while_they_are_there(hooks: Any, register: Any, others: Any) -> None:
    weight = torch.nn.Parameter(doubles(3))
    assert not hooks(weight)
    handle = register(weight, lambda _: None)
    assert hooks(weight)
    assert not others(weight)
    handle.remove()
    assert not hooks(weight)


def test_function_modes_are_counted_and_left() -> None:
    before = torch_compat.function_modes()
    mode = BaseTorchFunctionMode()
    mode.__enter__()
    assert torch_compat.function_modes() == before + 1
    torch_compat.leave_function_modes(before)
    assert torch_compat.function_modes() == before


def test_a_tensors_reference_outlives_its_python_object() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    reference = torch_compat.TensorWeakRef(weight.grad)
    gc.collect()
    assert reference() is weight.grad
    weight.grad = None
    assert reference() is None


def test_forward_pre_hooks_can_be_removed_by_their_keys() -> None:
    module = torch.nn.Identity()
    module.register_forward_pre_hook(lambda *_: None)
    hooks = torch_compat.forward_pre_hooks(module)
    (key,) = hooks
    del hooks[key]
    module.register_forward_pre_hook(lambda *_: pytest.fail("not this one")).remove()
    module(torch.zeros(1))


W = torch.randn(3, 3, requires_grad=True)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda x: torch.func.grad(lambda z: z.exp().sum())(x),
        lambda x: torch.func.jvp(lambda z: F.linear(torch.tanh(z), W), (x,), (x,))[1],
    ],
    ids=["backward", "forward"],
)
def test_derivatives_by_func_do_not_go_with_hooks_on_what_is_saved(derivative: Callable[[Tensor], Tensor]) -> None:
    def pack(tensor: Tensor) -> Tensor:
        tensor.untyped_storage().data_ptr()
        return tensor

    x = torch.randn(3, requires_grad=True)
    kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with kept, pytest.raises(RuntimeError) as raised:
        derivative(x)
    assert torch_compat.hides_what_is_saved(raised.value)
    assert not torch_compat.hides_what_is_saved(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_derivative_without_a_graph_is_told_from_other_errors() -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad(), pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(x.sum(), x)
    assert torch_compat.lacks_a_graph(raised.value)
    assert not torch_compat.lacks_a_graph(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@wrap_torch_function(lambda x: (x,))
def wrapped(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize(
    ("function", "visible"),
    [
        (torch.add, True),
        (Tensor.add, True),
        (Tensor.__getitem__, True),
        (F.linear, True),
        (F.embedding, True),
        (F.multi_head_attention_forward, True),
        (torch.ops.aten.add.Tensor, True),
        (torch.ops.aten.add, True),
        (torch.autograd.grad, True),
        (wrapped, True),
        (F.max_pool2d, False),
        (lambda x: x + 1, False),
        (math.sqrt, False),
        (Cube.apply, False),
        (nn.Linear, False),
        (nn.ReLU(), False),
    ],
)
def test_which_functions_are_visible_to_function_modes(function: Any, visible: bool) -> None:
    assert torch_compat.is_visible_to_function_modes(function) == visible


def test_what_is_visible_is_seen() -> None:
    x = torch.randn(2, 3)
    with Seen() as seen:
        for function in (torch.add, Tensor.add, F.linear, torch.ops.aten.add.Tensor):
            function(x, x)
        Tensor.__getitem__(x, 0)
        wrapped(x)
        torch.func.jvp(torch.tanh, (x,), (x,))
    named = {torch.add, Tensor.add, Tensor.__getitem__, F.linear, torch.ops.aten.add.Tensor, wrapped}
    assert named | {torch_compat.make_dual} <= set(seen.functions)


def test_levels_of_func_are_counted_and_left() -> None:
    functorch = torch._C._functorch

    def interrupted() -> None:  # levels as the transforms enter them, without a way back
        functorch._grad_increment_nesting()
        functorch._vmap_increment_nesting(2, "error")
        functorch._jvp_increment_nesting()
        functorch._func_increment_nesting(True)
        raise KeyboardInterrupt

    before = torch_compat.func_levels()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch_compat.func_levels() == before + 4
    for left in (3, 1, 0):
        torch_compat.leave_func_levels(before + left)
        assert torch_compat.func_levels() == before + left
    assert torch.equal(vmap(torch.func.grad(torch.sin))(torch.zeros(2)), torch.ones(2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_plain_calls_for_a_while(reentrant: bool) -> None:
    calls = 0

    def function(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.exp()

    x = torch.randn(3, requires_grad=True)
    for expected in (1, 2):
        calls = 0
        with torch_compat.without_checkpoints() if expected == 1 else nullcontext():
            output = checkpoint(function, x, use_reentrant=reentrant).sum()
        output.backward()
        assert calls == expected


def test_variants_of_checkpoints_nest_and_overlap() -> None:
    own = torch.utils.checkpoint.CheckpointFunction
    first, second = torch_compat.without_checkpoints(), torch_compat.without_reentrant_checkpoints()
    first.__enter__()
    plain = torch.utils.checkpoint.CheckpointFunction
    with torch_compat.without_checkpoints():
        pass
    assert torch.utils.checkpoint.CheckpointFunction is plain is not own
    second.__enter__()
    first.__exit__(None, None, None)  # another thread's, say
    assert torch.utils.checkpoint.CheckpointFunction not in (plain, own)
    second.__exit__(None, None, None)
    assert torch.utils.checkpoint.CheckpointFunction is own


def test_variants_of_checkpoints_that_an_interruption_left_open_are_left() -> None:
    own, before = torch.utils.checkpoint.CheckpointFunction, torch_compat.checkpoint_variants()
    interrupted, elsewhere = torch_compat.without_reentrant_checkpoints(), torch_compat.without_checkpoints()
    thread = threading.Thread(target=elsewhere.__enter__)
    thread.start()
    thread.join()
    others = torch.utils.checkpoint.CheckpointFunction
    interrupted.__enter__()
    torch_compat.restore_checkpoint_variants(before)
    assert torch.utils.checkpoint.CheckpointFunction is others is not own
    elsewhere.__exit__(None, None, None)
    assert torch.utils.checkpoint.CheckpointFunction is own
    with torch_compat.without_checkpoints():
        pass
    assert torch.utils.checkpoint.CheckpointFunction is own
    assert torch_compat.checkpoint_variants() == before
