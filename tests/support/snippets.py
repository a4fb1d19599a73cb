"""Python snippets of the documentation, run as a reader would: those of a page one after the other, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def snippets(page: str, engines: bool = False) -> list[tuple[int, str]]:
    """Line number and source of a page's snippets. Args: engines: with those that are marked as needing real engines."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python( \{engines\})?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(2)].count("\n") + 1, match[2]) for match in found if engines or not match[1]]


def run_page(page: str, engines: bool = False) -> dict[str, Any]:
    """Run a page's snippets; a failure names the page's line. Returns: their namespace."""
    names: dict[str, Any] = {"__name__": page}
    for line, source in snippets(page, engines):
        code = compile("\n" * (line - 1) + source, str(DOCS / page), "exec")
        exec(code, names)
    return names
