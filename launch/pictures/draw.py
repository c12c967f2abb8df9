"""Draw memory-7b.png: what a ternary model of 7B parameters keeps allocated on 8 workers, and its baselines.

python launch/pictures/draw.py
"""

from pathlib import Path

from lowbit_dist import charts, configfile, memory

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "dqt-ternary.yaml"
CHANGES = ("model.preset=7b", "cluster.workers=8", "train.batch_tokens=16384")
VOCABULARY = 32_000


def bars() -> charts.Memory:
    """Bar -> component -> bytes of all workers per parameter, as `lowbit plan` has them."""
    planned = memory.plan(configfile.load(CONFIG, CHANGES), VOCABULARY)
    return {
        name.replace("this run", "ternary"): parts
        for name, parts in charts.bytes_per_parameter(planned).items()
    }


if __name__ == "__main__":
    charts.memory_bars(
        bars(), HERE / "memory-7b.png", title="A model of 7B parameters on 8 workers, between steps"
    )
