"""Every point of sweeps against one of them by score, prompt by prompt. See `--help`."""

import sys

from kv_lm_eval.experiments.score_table import main

if __name__ == "__main__":
    sys.exit(main())
