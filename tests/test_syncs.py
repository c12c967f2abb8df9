"""How often the training loop waits for a GPU: numbers that it asks of tensors."""

import sys
from collections import Counter

import lowbit_dist
from lowbit_dist import configfile

PACKAGE = lowbit_dist.__path__[0]
# What a step asks for: of the device once, the losses of its passes with the norm of their gradient.
OF_A_STEP = {
    ("/zero/engine.py", "cpu"): 1,
    # These are on the host then, and what C divides by always is.
    ("/zero/engine.py", "item"): 1,
    ("/loop.py", "__bool__"): 1,
    ("/loop.py", "item"): 1,
    ("/ops/cpu.py", "item"): 1,
}


def asked(configuration):
    """Where the package's own code asks for numbers, or tensors of them, in a run."""
    import torch
    from pytest import MonkeyPatch

    from lowbit_dist import loop

    places = []

    def counted(name):
        ask = getattr(torch.Tensor, name)

        def count(tensor, *args):
            file = sys._getframe(1).f_code.co_filename
            if file.startswith(PACKAGE) and tensor.device.type == "cpu":
                places.append((file.removeprefix(PACKAGE), name))
            return ask(tensor, *args)

        return count

    with MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, counted(name))
        loop.run(configfile.from_dict(configuration))
    return places


def test_no_micro_batch_waits_for_the_device_and_a_step_once(ranks, small):
    def run(steps, micro_batches):
        # A sampled step, the second, is watched: there is one in each of these runs.
        train = {
            "steps": steps, "micro_batch": 1, "batch_tokens": micro_batches * 64, "log_every": 99,
            "eval_every": 99, "save_every": 99,
        }  # fmt: skip
        content = small(run={"name": f"{steps}-{micro_batches}"}, train=train, cluster={"workers": 1})
        return Counter(ranks(1).run(asked, content)[0])

    short, long, wide = run(3, 2), run(6, 2), run(3, 6)
    assert wide == short, "none of a micro-batch"
    assert long - short == {place: 3 * n for place, n in OF_A_STEP.items()}
