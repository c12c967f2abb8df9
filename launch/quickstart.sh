#!/usr/bin/env bash
# From nothing to text written by a ternary model: a tokenizer and data from Python's own standard library, two
# DeepSpeed workers under Ray, a sample.  About five minutes on two cores, after the installation.
source "$(dirname "$0")/setup.sh"

if [ ! -f data/stdlib/manifest.json ]; then
    lowbit tokenizer train --input stdlib --vocab-size 2048 --out data/tokenizer
    lowbit data prepare --input stdlib --tokenizer data/tokenizer --out data/stdlib
fi
lowbit train configs/quickstart.yaml "$@"
lowbit generate quickstart --prompt "def " --max-new-tokens 120
