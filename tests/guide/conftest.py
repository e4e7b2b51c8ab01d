"""Scripts of the documentation site, which lie beside its pages, can be imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "guide"))
