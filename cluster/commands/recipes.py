"""`kdray init`: recipes that are installed with kdray, listed or written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_base import exit_codes


def init(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe's name; without one, list them.")] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="A new file; <recipe>.yaml otherwise.")] = None,
) -> None:
    """Write a recipe that came with kdray to a file of yours, or list them all."""
    with exit_codes():
        from kdray.config.shipped import stories, write_recipe
        from kdray.errors import DataError

        if recipe is None and to is not None:
            raise DataError(f"--to {to}: nothing says which recipe; name one, `kdray init` lists them")
        if recipe is None:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            listed = Table.grid("", "", padding=(0, 2, 0, 0))
            listed.columns[0].no_wrap = True
            for name, (shows, runs_on) in stories().items():
                listed.add_row(Text(name), Text(f"{shows} ({runs_on})"))
            Console().print(listed)
            return
        typer.echo(write_recipe(recipe, to))
