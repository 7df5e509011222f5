"""Speed and memory of all methods on one model: `kv-lm-eval bench`, from a checkout. See `--help`."""

import sys

from kv_lm_eval.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
