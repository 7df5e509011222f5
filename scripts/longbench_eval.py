"""LongBench's scores of predictions that are there already. See `--help`."""

import sys

from kv_lm_eval.experiments.longbench_eval import main

if __name__ == "__main__":
    sys.exit(main())
