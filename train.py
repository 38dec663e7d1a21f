"""`python train.py RECIPE …` is `mla-moe train RECIPE …`: see mla_moe/cli/train.py."""

import os
import sys

if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # As `reexecute_with_huge_pages`, before the imports, which take seconds.
    os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})

from mla_moe.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
