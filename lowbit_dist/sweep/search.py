"""What a sweep's file has run, in which order: with a `search`, first the points of each label's grid, in
runs of their own, and then every label at the best of them, with all of its seeds.

    grid: {optimizer.lr: [1.0e-3, 2.0e-3, 4.0e-3]}
    search: {train.steps: 250}           # what sets the runs of the search apart, over all else

The search is a sweep called NAME-search, with the first seed alone; the lowest validation loss at the end of
a run decides.  A best value at the end of its axis may have a better one beyond it: an axis of three numbers
or more grows there, by the ratio of its last two, and the search resumes.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit_dist import naming, runs
from lowbit_dist.errors import ConfigError
from lowbit_dist.sweep.definition import Child, Sweep, SweepFile, Variant, check_different, in_words, once

MOST_WIDENINGS = 4  # of a search, by a value for each axis

Point = Mapping[str, Any]


def load(file: Path) -> Sweep:
    """The first of the sweeps that a file defines; ConfigError for whatever is wrong with it."""
    return next(stages(file))


def stages(file: Path) -> Iterator[Sweep]:
    """The sweeps that a file defines.  What one has found decides on the next, which is to be asked for when
    the one before has been run.
    """
    source = SweepFile.read(file)
    variants, search = source.definition.variants(), source.definition.search
    if search is None:
        sweep = source.sweep(variants)
        check_different(sweep.children)
        yield sweep
        return
    source.sweep(variant.at(next(variant.points())) for variant in variants)  # are they right without it?
    remarks: list[str] = []
    for n_widenings in range(MOST_WIDENINGS + 1):
        searched = [replace(variant, seeds=variant.seeds[:1]) for variant in variants if variant.grid]
        sweep = source.sweep(searched, suffix="-search", overrides=search, remarks=tuple(remarks))
        check_different(sweep.children)
        yield sweep
        best = _best_points(source, searched, sweep.children)
        widened = [_widened(source, variant, best.get(variant.label, {})) for variant in variants]
        is_wide_enough = widened == variants
        if is_wide_enough or n_widenings == MOST_WIDENINGS:
            break
        remarks = _differences(variants, widened)
        variants = widened
    remarks = [
        _found(variant, best[variant.label], is_at_end=variant != wider)
        for variant, wider in zip(variants, widened, strict=True)
        if variant.grid
    ]
    yield once(
        source.sweep(
            (variant.at(best.get(variant.label, {})) for variant in variants), remarks=tuple(remarks)
        )
    )


def _best_points(
    source: SweepFile, variants: Sequence[Variant], children: Sequence[Child]
) -> dict[str | None, Point]:
    """Each label's; ConfigError if none of its runs has a loss."""
    by_label = {child.label: child for child in children}
    best: dict[str | None, Point] = {}
    for variant in variants:
        tried = [by_label[variant.named(point, source.base)] for point in variant.points()]
        losses = {child.name: _loss(child) for child in tried}
        winner = min(tried, key=lambda child: losses[child.name])
        if losses[winner.name] == math.inf:
            raise ConfigError(
                f"none of the {len(tried)} runs of {variant.label or source.base.stem}'s search has a "
                f"validation loss; `lowbit runs {winner.config.run.dir}` says why"
            )
        best[variant.label] = winner.point
    return best


def _loss(child: Child) -> float:
    """The validation loss at the end; infinite of a run that did not reach it."""
    if not naming.is_run(child.config.run_dir):
        return math.inf
    run = runs.read(child.config.run_dir)
    loss = (run.summary or {}).get("val_loss") if run.state == "finished" else None
    return math.inf if loss is None else float(loss)


def _widened(source: SweepFile, variant: Variant, best: Point) -> Variant:
    """With one more value on each axis whose end is the best, if the field may have it."""
    axes = dict(variant.grid)
    for name, values in variant.grid.items():
        for value in _beyond(values, best[name]):
            with contextlib.suppress(ConfigError):
                source.sweep([variant.at({**best, name: value})], overrides=source.definition.search or ())
                axes[name] = (*values, value)
    return replace(variant, grid=axes)


def _beyond(values: tuple[Any, ...], best: Any) -> tuple[float, ...]:
    """What follows the best value of an axis, if that is one of its ends.

    Of two values both are ends, and of whole numbers (sizes) the next may not be one.
    """
    are_numbers = all(type(x) in (int, float) and x > 0 for x in values)
    if len(values) < 3 or not are_numbers or all(type(x) is int for x in values):
        return ()
    ordered = sorted(values)
    if best not in (ordered[0], ordered[-1]):
        return ()
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    return (float(f"{best * best / neighbour:.6g}"),)


def _differences(before: Sequence[Variant], after: Sequence[Variant]) -> list[str]:
    return [
        f"{old.label or 'its'}: the best {name} is an end of its grid, which gets {values[-1]:g}, too"
        for old, new in zip(before, after, strict=True)
        for name, values in new.grid.items()
        if values != old.grid[name]
    ]


def _found(variant: Variant, best: Point, *, is_at_end: bool) -> str:
    end = "; that is still an end of the grid: write wider values" if is_at_end else ""
    return f"{variant.label or 'it'} is best at {', '.join(in_words(best))}{end}"
