"""Does a window by head type beat one window for all? See `--help`."""

import sys

from kv_lm_eval.analysis.ablate import main

if __name__ == "__main__":
    sys.exit(main())
