"""Functions of tensors that PyTorch knows by name: they work on tensors without values, too, and a compiler
leaves each to itself.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("lowbit", "DEF")


def named(
    schema: str, fake: Callable[..., Any], *, takes_strides: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the op lowbit::`schema`; `fake` gives its results without values.

    `takes_strides`: it takes tensors of any; others read raw memory, and for each call of one of them a
    compiler makes a copy of what it would not keep.

    It changes none of its arguments, and none of its results shares their memory or outlives its caller's:
    a compiler reuses it.  `torch.library.custom_op` would see to that in each call, which takes as long as a
    launch; and gradients are not for ops, but for who calls them.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        layout = torch.Tag.flexible_layout if takes_strides else torch.Tag.needs_exact_strides
        name = _LIBRARY.define(schema, tags=(layout,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lowbit::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.lowbit, name).default  # type: ignore[no-any-return]

    return define
