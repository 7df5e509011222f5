"""What does each attention head look at? See `--help`."""

import sys

from kv_lm_eval.analysis.analyze import main

if __name__ == "__main__":
    sys.exit(main())
