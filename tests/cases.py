"""Cases of a test, of which a few stand for all until `launch/test.sh all`."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def standing(cases: Mapping[str, Any], *first: str) -> Sequence[Any]:
    """For `parametrize`: `first` in every pass, the others, which repeat the same steps, as slow ones."""
    assert cases.keys() >= set(first), "those that stand for the others are cases"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name,
            marks=[] if name in first else [pytest.mark.slow],
        )
        for name, case in cases.items()
    ]


def slow(*cases: Sequence[Any]) -> Sequence[Any]:
    """Cases like the others beside them."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]
