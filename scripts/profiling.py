"""Where does the time of a method go? See `--help`."""

import sys

from kv_lm_eval.bench.profiling import main

if __name__ == "__main__":
    sys.exit(main())
