"""The baselines of a streamed text, measured once; see `--help`."""

import sys

from kv_lm_eval.experiments.fixed_baseline import main

if __name__ == "__main__":
    sys.exit(main())
