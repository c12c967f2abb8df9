"""Data prepared in the process that wants it: Ray's take seconds to start, and the bytes are the same."""

import pytest

from lowbit_dist import data, tokenizer
from lowbit_dist.data import tokenizing


def prepare_alone(sources, words, out, **options):
    """`data.prepare(sources, words, out, ...)`, without Ray."""
    loaded = tokenizer.load(words)

    def tokenised(chosen, words, seed, workers):
        for bundle in tokenizing._bundles(chosen):
            for row in tokenizing._tokenise({"parts": [bundle]}, None, loaded.sha256, seed):
                yield {name: column[0] for name, column in row.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tokenizing._loaded, loaded.sha256, loaded)
        patch.setattr(tokenizing, "tokenised", tokenised)
        return data.prepare(sources, words, out, **options)
