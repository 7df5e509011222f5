"""Does pruning hurt right where it happens? See `--help`."""

import sys

from kv_lm_eval.experiments.pruning import main

if __name__ == "__main__":
    sys.exit(main())
