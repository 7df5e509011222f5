"""Needle heat-maps from lm-eval's results. See `--help`."""

import sys

from kv_lm_eval.experiments.needle_heatmap import main

if __name__ == "__main__":
    sys.exit(main())
