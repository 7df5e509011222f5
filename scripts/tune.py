"""The smallest cache that answers as well as the full one: `kv-lm-eval tune`, from a checkout. See `--help`."""

import sys

from kv_lm_eval.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
