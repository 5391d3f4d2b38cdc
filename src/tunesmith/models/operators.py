"""Operators of our own: a compiler passes them by, and little else stands between who calls and what computes.

`torch.library.custom_op` would do, were it not for its checks in Python at every call and its own layer of autograd:
with six calls per block they took a third of the time that the host needs to launch a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("tunesmith", "DEF")
# Inputs keep the order of their strides; rows may be padded, as a compiler likes them, and are not copied together.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def operator(shape_like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator `tunesmith::NAME`, for any device, without a gradient: who differentiates it calls it
    from an `autograd.Function`. It writes to no argument and returns none of them.

    shape_like: what a compiler calls for the output's shape and dtype, with the same arguments.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__.lstrip("_")
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=_TAGS)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tunesmith::{name}", shape_like, lib=_LIBRARY)
        return getattr(torch.ops.tunesmith, name).default

    return register
