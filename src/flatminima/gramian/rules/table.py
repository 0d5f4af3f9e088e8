"""Which function has which rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.gramian.rules.attention import attention
from flatminima.gramian.rules.base import PutBack, Rule
from flatminima.gramian.rules.convolution import convolution
from flatminima.gramian.rules.elementwise import add, commuted, expand, multiply
from flatminima.gramian.rules.embedding import embedding, looked_up
from flatminima.gramian.rules.extracts import entries, unsqueezed
from flatminima.gramian.rules.linear import addmm, linear, matmul
from flatminima.gramian.rules.normalization import batch_norm, group_norm, instance_norm, layer_norm, rms_norm

EXTRACTS: dict[Callable[..., Any], Callable[..., tuple[Tensor, PutBack] | None]] = {
    torch.Tensor.__getitem__: entries,
    torch.Tensor.unsqueeze: unsqueezed,
    torch.unsqueeze: unsqueezed,
    F.embedding: looked_up,
}
"""Functions that take entries out of a tensor: the call's arguments → the tensor, and how rows of J go back into it."""


SPLIT: dict[Callable[..., Any], Callable[..., Any]] = {F.multi_head_attention_forward: attention}
"""Functions that hide calls with rules from the recorder, and the same as calls that it sees."""


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.embedding: embedding,
    torch.add: commuted(add),
    torch.Tensor.add: commuted(add),
    torch.Tensor.add_: add,
    torch.Tensor.__iadd__: add,
    torch.Tensor.expand: expand,
    torch.mul: commuted(multiply),
    torch.Tensor.mul: commuted(multiply),
}
"""The functions whose parameters have a rule. ``rule(n, *args, **kwargs)`` takes the function's own arguments."""
