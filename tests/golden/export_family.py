"""Write DIR/CASE for `make_family.py --check DIR`: each tiny model as the package saves it.

python -m tests.golden.export_family DIR [CASE …]
"""

import sys
import tempfile
from pathlib import Path

from mla_moe import load_pretrained, save_pretrained
from tests.checkpoint.test_family import write
from tests.golden.family import CASES

if __name__ == "__main__":
    for case in sys.argv[2:] or CASES:
        with tempfile.TemporaryDirectory() as directory:
            write(case, Path(directory) / case)
            source = Path(directory) / case
            save_pretrained(load_pretrained(source), Path(sys.argv[1]) / case, like=source)
