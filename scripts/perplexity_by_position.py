"""Perplexity of each point of a sweep by place in the text. See `--help`."""

import sys

from kv_lm_eval.experiments.by_position import main

if __name__ == "__main__":
    sys.exit(main())
