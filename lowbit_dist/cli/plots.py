"""Curves of characters, for a terminal."""

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
BRAILLE = 0x2800  # the empty one; each has 2 columns of 4 dots
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, from the top

Points = Sequence[tuple[float, float]]  # x, y; x never falls


def spark(values: Sequence[float], width: int) -> str:
    """A line of bars: the lowest value has the smallest one."""
    means = [y for _, y in _means(list(enumerate(values)), width)]
    low, span = min(means, default=0.0), (max(means, default=0.0) - min(means, default=0.0)) or 1.0
    return "".join(BLOCKS[round((y - low) / span * (len(BLOCKS) - 1))] for y in means)


def curve(points: Points, *, width: int, height: int) -> list[str]:
    """`height` lines of `width` characters; the highest point touches the first, the lowest the last."""
    cells = [[0] * width for _ in range(height)]
    means = _means(points, 2 * width)
    low, high = min((y for _, y in means), default=0.0), max((y for _, y in means), default=0.0)

    def row(y: float) -> int:
        return round((high - y) / ((high - low) or 1.0) * (4 * height - 1))

    def dot(x: int, y: int) -> None:
        cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]

    for x, y in means[:1]:
        dot(x, row(y))
    for (x0, y0), (x1, y1) in pairwise(means):
        before = row(y0)
        for x in range(x0 + 1, x1 + 1):
            now = row(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
            # A steep part is a stroke from height to height, without gaps.
            for y in range(min(before, now), max(before, now) + 1):
                dot(x, y)
            before = now
    return ["".join(chr(BRAILLE + cell) for cell in line) for line in cells]


def _means(points: Points, columns: int) -> list[tuple[int, float]]:
    """The mean height in each of at most `columns` equal parts of the width; parts without a point are left
    out.
    """
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    by_column: dict[int, list[float]] = {}
    for x, y in points:
        column = min(columns - 1, int((x - first) / ((last - first) or 1.0) * columns))
        by_column.setdefault(column, []).append(y)
    return [(column, sum(ys) / len(ys)) for column, ys in by_column.items()]
