"""MosaicML Streaming without the datasets of its own that it brings along."""

import sys
import types

# Importing Streaming imports these, and with them transformers' tokenizers, scikit-learn and torchvision: two
# seconds of every worker's start, for classes that nobody here uses.
NEEDLESS = ("streaming.multimodal", "streaming.text", "streaming.vision")


def import_streaming() -> None:
    """Call before importing anything of Streaming; what is left out can still be imported afterwards."""
    if "streaming" in sys.modules:
        return
    left_out = [name for name in NEEDLESS if name not in sys.modules]
    for name in left_out:
        sys.modules[name] = types.ModuleType(name)
    try:
        import streaming  # noqa: F401
    finally:
        for name in left_out:
            del sys.modules[name]
