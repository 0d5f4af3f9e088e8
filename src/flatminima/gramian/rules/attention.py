"""Multi-head attention, whose projections are hidden in one call."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.gramian.rules.base import split


@split(F.multi_head_attention_forward)
def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    """``F.multi_head_attention_forward``, with its projections as calls of their own; None where that is not done.

    Identity matrices, which change nothing, stay in their place. The calls before and after are of (N, T, E), not of
    the (T, N, E) that attention works on.
    """
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    query = given["query"]
    if given["in_proj_weight"] is None or given["bias_k"] is not None or query.dim() != 3:
        return None
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    out_weight, out_bias = given["out_proj_weight"], given["out_proj_bias"]
    size = query.shape[-1]
    projected: dict[int, Tensor] = {}
    for i, name in enumerate(("query", "key", "value")):
        x = given[name]
        if id(x) not in projected:
            projected[id(x)] = F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
        given[name] = projected[id(x)][..., i * size : (i + 1) * size]
    same = torch.eye(size, dtype=query.dtype, device=query.device)
    given |= {"in_proj_weight": same.repeat(3, 1), "in_proj_bias": None, "out_proj_weight": same, "out_proj_bias": None}
    attended, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
    return F.linear(attended.transpose(0, 1), out_weight, out_bias).transpose(0, 1), weights
