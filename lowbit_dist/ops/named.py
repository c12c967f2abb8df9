"""Functions of tensors that PyTorch knows by name: they work on tensors without values, too, and a compiler
leaves each to itself.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("lowbit", "DEF")


def named(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the op lowbit::`schema`; `fake` gives its results without values.

    It changes none of its arguments, and none of its results shares their memory or outlives its caller's:
    a compiler reuses it.  `torch.library.custom_op` would see to that in each call, which takes as long as a
    launch; and gradients are not for ops, but for who calls them.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))  # it reads raw memory
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lowbit::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.lowbit, name).default  # type: ignore[no-any-return]

    return define
