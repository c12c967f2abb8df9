"""Token data: documents become hashed MDS shards, and shards become batches whose order is a pure function.

`prepare` writes a folder: `manifest.json` (written last: its presence says complete), `tokenizer/`, and
`train/` and `val/`, each an MDS dataset of one column, `tokens`; with prompts of a second one, `is_counted`.

1. Documents are read and tokenised in parallel (Ray Data), in the order of the input.  Few and large ones,
   which would leave val empty, are split.
2. A hash of a document's text puts it into train or val, so equal documents fall on one side.
3. Each side is one stream, `<s> document </s> <s> document </s> ...`, cut into samples of `seq_len` tokens;
   a model's own tokenizer may have one of the two marks alone.  What is left at the stream's end, less than a
   sample, is dropped and counted.
4. Where documents are prompts and responses, the two are tokenised apart and joined, and the loss counts the
   tokens of responses and the marks behind them: those are 1 in `is_counted`, all others 0.  A sample in
   which it would count none is left out.

`Batches` gives the samples back.  Sample number `s` counts over all epochs; the place it is read from is a
function of (seed, s) alone.  So there is no iterator to save, any number of workers reads the same batches,
and each epoch is a permutation: shards are permuted, then samples are shuffled inside a window of shards,
which keeps reading local.  Shards are read one by one through Streaming's reader; its `StreamingDataset` is
not used, for it refuses a second run on the same folder and ties a host's processes by shared memory.
`Feed` brings them to the device, to a GPU ahead of time.
"""

from lowbit_dist.data.feed import Feed
from lowbit_dist.data.manifest import Manifest, Split, check, copy_tokenizer, read_manifest
from lowbit_dist.data.reading import IGNORED, Batches, DamagedData, Order, check_cache
from lowbit_dist.data.writing import prepare

__all__ = [
    "IGNORED", "Batches", "DamagedData", "Feed", "Manifest", "Order", "Split", "check", "check_cache",
    "copy_tokenizer", "prepare", "read_manifest",
]  # fmt: skip
