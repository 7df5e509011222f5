"""Which token is the attention sink, and do low key norms mean attention? See `--help`."""

import sys

from kv_lm_eval.analysis.find_sinks import main

if __name__ == "__main__":
    sys.exit(main())
