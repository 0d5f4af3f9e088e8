"""Directions in the space of weights: random, along the Hessian's eigenvectors, towards other models."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flatminima.errors import needing, require
from flatminima.gramian import unwrapped
from flatminima.losses import Loss
from flatminima.measures import DataSurface, hessian_of, top_eigenpairs
from flatminima.network import Samples, differentiating, require_values
from flatminima.parallel import is_sharded
from flatminima.progress import ProgressBar

Direction = dict[str, Tensor]
"""What is added to parameters and buffers by name; others stay."""

OtherModel = nn.Module | Mapping[str, Tensor]
"""A model, or its ``state_dict``."""

_SAMPLES_AT_ONCE = 300
"""Of which a Hessian product takes a third, as it goes back through two passes."""


def movable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def random_directions(model: nn.Module, seed: int, count: int) -> list[Direction]:
    """Gaussian, each filter of the norm of the network's own; one-dimensional parameters stay (Li et al., Sec. 4)."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.dim() > 1}
    require(
        len(weights) > 0,
        "the model has no trainable weights of two or more dimensions to move: set requires_grad on those to be moved, "
        "or use directions='between'",
    )
    require(
        any(bool(weight.any()) for weight in weights.values()),
        "all weights of two or more dimensions are zero, and so would be the directions, which have their norms",
    )
    return [_random_direction(weights, (seed + number) % 2**64) for number in range(count)]


def _random_direction(weights: Mapping[str, Tensor], seed: int) -> Direction:
    generator = torch.Generator("cpu").manual_seed(seed)
    direction = {}
    for name, weight in weights.items():
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device="cpu").flatten(1)
        norms = weight.detach().double().cpu().flatten(1).norm(dim=1, keepdim=True)
        scaled = drawn * (norms / drawn.norm(dim=1, keepdim=True))
        direction[name] = scaled.view(weight.shape).to(weight)
    return direction


def eigenvectors(
    model: nn.Module, samples: Samples, loss: Loss, count: int, seed: int, progress: bool
) -> tuple[tuple[float, ...], list[Direction]]:
    """The largest eigenvalues of the Hessian, and their eigenvectors, of length 1 (Yao et al. 2020, PyHessian)."""
    surface = DataSurface(model, samples, loss, _SAMPLES_AT_ONCE)
    require(
        sum(weight.numel() for weight in surface.parameters.values()) >= count,
        f"the model has fewer trainable parameters than directions: dimensions={count}",
    )
    generator = torch.Generator("cpu").manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(differentiating(model))
        stack.enter_context(needing("curvature", "a landscape along the Hessian's eigenvectors"))
        bar = stack.enter_context(ProgressBar("Hessian products", None, enabled=progress))
        hessian = stack.enter_context(hessian_of(surface, generator))
        hessian.after_product = bar.advance
        values, vectors = top_eigenpairs(hessian, count, generator)
    sizes = [weight.numel() for weight in surface.parameters.values()]
    directions = [
        {
            name: part.view_as(weight).to(weight)
            for (name, weight), part in zip(surface.parameters.items(), torch.split(vector, sizes), strict=True)
        }
        for vector in vectors.unbind(1)
    ]
    return tuple(values.tolist()), directions


def ways_to(model: nn.Module, others: Sequence[OtherModel]) -> list[Direction]:
    """From the model's weights, and floating-point buffers, to those of others."""
    own = model.state_dict()  # without buffers that are not saved, such as frequencies of rotary embeddings
    here = {name: tensor for name, tensor in movable(model).items() if name in own}
    require(len(here) > 0, f"{type(model).__name__} has no weights: there is nothing between two of it")
    ways: list[Direction] = []
    for number, other in enumerate(others):
        what = "the other weights" if len(others) == 1 else f"the weights of to[{number}]"
        ways.append(_way(here, own.keys(), other, what))
    if len(ways) == 2:
        require(
            any(not torch.equal(along, ways[1][name]) for name, along in ways[0].items()),
            "both models of to= have the same weights, and span no plane: pass one of them, for a line",
        )
    return ways


def _way(here: Mapping[str, Tensor], names: Iterable[str], other: OtherModel, what: str) -> Direction:
    if isinstance(other, nn.Module):
        require_values(other)
        other = unwrapped(other).state_dict()
    unlike = f"{what} do not fit the model"
    remedy = "pass a network of the same class and sizes, or its state_dict"
    foreign = sorted(map(str, other.keys() - set(names)))
    for name, tensor in here.items():
        extra = f" (it has {foreign[0]!r}, which the model lacks)" if foreign else ""
        require(name in other, f"{unlike}: {name} is missing{extra}; {remedy}")
        _require_floats(what, name, other[name])
        shapes = tuple(other[name].shape), tuple(tensor.shape)
        require(shapes[0] == shapes[1], f"{unlike}: {name} is {shapes[0]}, not {shapes[1]}; {remedy}")
    require(not foreign, f"{unlike}: the model lacks {next(iter(foreign), '')!r}; {remedy}")
    way = {name: other[name].detach().to(tensor) - tensor for name, tensor in here.items()}
    broken = [name for name, along in way.items() if not bool(along.isfinite().all())]
    require(not broken, f"{what} hold NaN or infinity: {next(iter(broken), '')}, in the model's type")
    require(
        any(bool(along.any()) for along in way.values()),
        f"{what} are the model's own, with nothing between: was the same checkpoint loaded twice, or one model trained "
        "on in place?",
    )
    return way


def _require_floats(what: str, name: str, value: object) -> None:
    found = value.dtype if isinstance(value, Tensor) else type(value).__name__
    require(
        isinstance(value, Tensor) and value.is_floating_point(),
        f"{what} must be floating-point tensors, but {name} is {found}: pass a model or its state_dict",
    )
    assert isinstance(value, Tensor)
    require(not is_lazy(value) and not value.is_meta, f"{what} are without values: {name} was never loaded")
    require(not is_sharded(value), f"{what} are sharded: load the checkpoint into one process")
