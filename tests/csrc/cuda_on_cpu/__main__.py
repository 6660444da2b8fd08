"""``python -m tests.csrc.cuda_on_cpu FOLDER``"""

import sys
from pathlib import Path

from tests.csrc.cuda_on_cpu import build

build(Path(sys.argv[1]))
