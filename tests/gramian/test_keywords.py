"""Functions called with all of their arguments by keyword, in any order, also under the names that NumPy gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.gramian import factored_gram
from support.oracles import explicit_gram

N = 5
VECTORS, SEQUENCES, IMAGES = (N, 4), (N, 3, 4), (N, 4, 6, 6)


class Case(NamedTuple):
    function: Callable[..., Tensor]
    inputs: tuple[int, ...]
    parameters: list[tuple[int, ...]]


ONES, ZEROS = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

BY_A_RULE = {
    "linear": Case(lambda x, w, b: F.linear(bias=b, weight=w, input=x), VECTORS, [(3, 4), (3,)]),
    "conv2d": Case(
        lambda x, w, b: F.conv2d(input=x, weight=w, bias=b, padding=1).mean(dim=(2, 3)), IMAGES, [(3, 4, 3, 3), (3,)]
    ),
    "embedding": Case(
        lambda x, w: F.embedding(input=(x.abs() * 3).long().clamp(max=6), weight=w).mean(dim=1), VECTORS, [(7, 3)]
    ),
    "embedding of positions": Case(
        lambda x, w, p: F.linear(x, w) + F.embedding(weight=p, input=torch.arange(3).expand(len(x), 3)).sum(dim=2),
        VECTORS,
        [(3, 4), (3, 2)],
    ),
    "layer_norm": Case(
        lambda x, w, b: F.layer_norm(input=x, normalized_shape=(4,), weight=w, bias=b), VECTORS, [(4,), (4,)]
    ),
    "group_norm": Case(
        lambda x, w, b: F.group_norm(input=x, num_groups=2, weight=w, bias=b).pow(exponent=2).mean((2, 3)),
        IMAGES,
        [(4,), (4,)],
    ),
    "batch_norm": Case(
        lambda x, w, b: F.batch_norm(input=x, running_mean=ZEROS, running_var=ONES, weight=w, bias=b),
        VECTORS,
        [(4,), (4,)],
    ),
    "add": Case(lambda x, p: torch.add(other=x, input=p), VECTORS, [(4,)]),
    "add to": Case(lambda x, w, p: F.linear(x, w).add_(other=p), VECTORS, [(3, 4), (3,)]),
    "mul": Case(lambda x, p: torch.mul(input=x, other=p), VECTORS, [(4,)]),
    "matmul": Case(lambda x, w: torch.matmul(other=w, input=x), VECTORS, [(4, 3)]),
    "addmm": Case(lambda x, b, w: torch.addmm(input=b, mat1=x, mat2=w), VECTORS, [(3,), (4, 3)]),
    "bmm": Case(lambda x, w: torch.bmm(mat2=w.expand(size=(len(x), 4, 3)), input=x).mean(dim=1), SEQUENCES, [(4, 3)]),
    "unsqueeze": Case(lambda x, p: x + torch.unsqueeze(input=p, dim=0), VECTORS, [(4,)]),
    "in place": Case(lambda x, w: torch.relu_(input=F.linear(input=x, weight=w)), VECTORS, [(3, 4)]),
    "sum": Case(lambda x, w: torch.sum(input=F.linear(input=x, weight=w), dim=1), SEQUENCES, [(3, 4)]),
    "softmax": Case(lambda x, w: torch.softmax(input=F.linear(x, w), dim=1).square().sum(dim=1), SEQUENCES, [(3, 4)]),
    "gather": Case(
        lambda x, w: torch.gather(input=F.linear(x, w), dim=1, index=torch.tensor([[2, 0]]).expand(len(x), 2)),
        VECTORS,
        [(3, 4)],
    ),
    "scatter": Case(
        lambda x, w: F.linear(x, w).scatter(dim=1, index=torch.zeros(len(x), 1, dtype=torch.long), src=x),
        VECTORS,
        [(3, 4)],
    ),
    "flatten": Case(lambda x, w: F.linear(torch.flatten(input=x, start_dim=1), w), SEQUENCES, [(3, 12)]),
    "transpose": Case(lambda x, w: F.linear(torch.transpose(input=x, dim0=1, dim1=2), w).sum(1), SEQUENCES, [(3, 3)]),
    "attention": Case(
        lambda x, w: F.scaled_dot_product_attention(query=F.linear(x, w), value=x, key=x).mean(dim=1),
        SEQUENCES,
        [(4, 4)],
    ),
    "pooling": Case(
        lambda x, w: F.adaptive_avg_pool2d(output_size=1, input=F.conv2d(input=x, weight=w)).flatten(start_dim=1),
        IMAGES,
        [(3, 4, 3, 3)],
    ),
}

WITHOUT_A_RULE = {
    "mm": Case(lambda x, w: torch.mm(input=x, mat2=w), VECTORS, [(4, 3)]),
    "bilinear": Case(lambda x, w: F.bilinear(input1=x, input2=x, weight=w), VECTORS, [(3, 4, 4)]),
    "where": Case(lambda x, p: torch.where(condition=x > 0, input=p, other=x), VECTORS, [(4,)]),
    "prelu": Case(lambda x, p: F.prelu(input=x, weight=p), VECTORS, [(4,)]),
    "add, NumPy's names": Case(lambda x, p: torch.add(**{"x1": x, "x2": p}), VECTORS, [(4,)]),
    "unsqueeze, NumPy's names": Case(lambda x, p: x + torch.unsqueeze(p, **{"axis": 0}), VECTORS, [(4,)]),
}


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = case.function
        self.own = nn.ParameterList(torch.randn(*shape, dtype=torch.float64) / 2 for shape in case.parameters)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.own)


@pytest.mark.parametrize("name", [*BY_A_RULE, *WITHOUT_A_RULE])
def test_arguments_by_keyword_are_as_good_as_by_position(name: str) -> None:
    case = (BY_A_RULE | WITHOUT_A_RULE)[name]
    model, inputs = Model(case), torch.randn(*case.inputs, dtype=torch.float64)
    targets = torch.arange(N) % model(inputs).shape[1]
    result, expected = factored_gram(model, inputs, targets), explicit_gram(model, inputs, targets)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-9, atol=1e-12)
    assert bool(result.generic_parameters) == (name in WITHOUT_A_RULE)
