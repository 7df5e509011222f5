"""StreamingLLM with lazy pruning on one long text, against both baselines; see `--help`."""

import sys

from kv_lm_eval.experiments.streaming import main

if __name__ == "__main__":
    sys.exit(main())
