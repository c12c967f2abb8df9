"""How often the training loop waits for a GPU: numbers that it asks of tensors."""

import sys

import lowbit_dist
from lowbit_dist import configfile

PACKAGE = lowbit_dist.__path__[0]
# Of the norm: the largest gradient, how many there are, and itself; of the step: its flips; of the passes:
# their losses.
OF_A_STEP = 5
ON_THE_HOST = 3  # asked of the losses when they are there, and of what C sums up


def asked(configuration):
    """How many numbers, or tensors of them, the package's own code asks for in a run."""
    import torch
    from pytest import MonkeyPatch

    from lowbit_dist import loop

    places = []

    def counted(name):
        ask = getattr(torch.Tensor, name)

        def count(tensor, *args):
            file = sys._getframe(1).f_code.co_filename
            if file.startswith(PACKAGE) and tensor.device.type == "cpu":
                places.append((file.removeprefix(PACKAGE), sys._getframe(1).f_lineno, name))
            return ask(tensor, *args)

        return count

    with MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, counted(name))
        loop.run(configfile.from_dict(configuration))
    return places


def test_no_micro_batch_and_few_places_of_a_step_wait_for_the_device(ranks, small):
    def run(steps, micro_batches):
        # A sampled step, the second, is watched: there is one in each of these runs.
        train = {
            "steps": steps, "micro_batch": 1, "batch_tokens": micro_batches * 64, "log_every": 99,
            "eval_every": 99, "save_every": 99,
        }  # fmt: skip
        content = small(run={"name": f"{steps}-{micro_batches}"}, train=train, cluster={"workers": 1})
        return ranks(1).run(asked, content)[0]

    short, long, wide = run(3, 2), run(6, 2), run(3, 6)
    assert len(wide) == len(short), "none of a micro-batch"
    assert len(long) - len(short) <= 3 * (OF_A_STEP + ON_THE_HOST)
