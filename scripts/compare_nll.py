"""Is run B really worse than run A? See `--help`."""

import sys

from kv_lm_eval.experiments.compare_nll import main

if __name__ == "__main__":
    sys.exit(main())
