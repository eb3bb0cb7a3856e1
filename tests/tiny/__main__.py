"""Build a tiny repository to try things on:  cd tests && python -m tiny FAMILY FOLDER  (a family is a module here)."""

import sys
from pathlib import Path

from . import build

family, folder = sys.argv[1:]
print(build(family, Path(folder)))
