"""Tables, pictures and a page from any folder of results: `kv-lm-eval report`, from a checkout. See `--help`."""

import sys

from kv_lm_eval.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
