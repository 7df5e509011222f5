"""`python -m kv_lm_eval`: the kv-lm-eval command, for `accelerate launch -m` and `torchrun -m`."""

import sys

from kv_lm_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
