"""Pages from the templates beside this file, and values as text.

A page is one file that loads nothing. It has the reader's light or dark colours, is readable from 400 px on, and names every
figure in words for those who do not see it.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kdray.runs.folder import utc_now

_TEMPLATES = Environment(
    loader=PackageLoader("kdray.runs.reports"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def page(template: str, **values: Any) -> str:
    """Fill a template of the folder `templates`; everything but the figures is escaped."""
    return _TEMPLATES.get_template(template).render(plotly=Markup(get_plotlyjs()), written_at=utc_now(), **values)


def show(value: Any) -> str:
    """A value of a run's files as text."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False)
