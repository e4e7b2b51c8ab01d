"""The README's Python examples, as they are printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def readme_blocks() -> list[str]:
    """All of them, in order."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
