"""Sweeps: a grid of runs as children of one MLflow run, several at once, resumable.

    sweep: {name: methods, dir: runs, at_once: auto}   # children are runs/methods/LABEL-seedN
    base: quickstart.yaml                              # beside this file
    set: {train.steps: 60, cluster.workers: 1}         # for every child, over what the base says
    seeds: [0, 1]                                      # a child for each, of every label
    runs:                                              # LABEL: what sets it apart
      dense: {method: {name: dense}, optimizer.states: fp32}
      ternary: [method.grid=ternary]                   # or as on the command line
      fine: {method.grid: int8, seeds: [0], grid: {}}  # with seeds and a grid of its own
    grid:                                              # and every combination of these
      optimizer.lr: [1.0e-3, 4.0e-3]
    search: {train.steps: 20}                          # finds the best of these, which alone is then trained

`definition` reads that file into children, each an ordinary configuration; `search` says which of them are
run, and in which order; `running` trains them, each in a
process of its own (`child`), and hands the comparison to MLflow.  The folder of a sweep holds its children's
folders and nothing that they need, so whatever works on a run works on a child.  Of the `run` section
children may be given `from` and `with_states`: a run's name is looked for beside them and beside the sweep.
"""

from lowbit_dist.sweep.definition import Child, Sweep
from lowbit_dist.sweep.running import SweepProgress, SweepResult, run
from lowbit_dist.sweep.search import load, stages

__all__ = ["Child", "Sweep", "SweepProgress", "SweepResult", "load", "run", "stages"]
