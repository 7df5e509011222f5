"""Many runs from one YAML file: `kv-lm-eval sweep`, from a checkout. See docs/sweeps.md and `--help`."""

import sys

from kv_lm_eval.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
