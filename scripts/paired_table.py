"""Every point of a sweep of perplexities against one of them, on the same tokens. See `--help`."""

import sys

from kv_lm_eval.experiments.paired_table import main

if __name__ == "__main__":
    sys.exit(main())
