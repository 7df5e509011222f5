"""Trains kv-tiny, the embedded model, on two CPU cores in about an hour. See `--help`."""

import sys

from kv_lm_eval.experiments.train_tiny import main

if __name__ == "__main__":
    sys.exit(main())
