"""`python -m mla_moe` is the command `mla-moe`."""

import sys

from mla_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
