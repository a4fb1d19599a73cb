"""Recipes that are installed with kdray: the files of `configs/`, which a wheel holds as data of this package."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from kdray.errors import DataError

FOLDER = Path(__file__).parents[1] / "recipes"
"""In a clone a link to `configs/`."""


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe, and of every cluster that one of them is planned on (`clusters/NAME`)."""
    files = sorted(FOLDER.rglob("*.yaml"), key=lambda file: (len(file.relative_to(FOLDER).parts), file))
    return {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in files}


def stories() -> dict[str, tuple[str, str]]:
    """Name -> what a recipe shows and what it runs on, as the table in its folder's README.md says."""
    found = {}
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if names := re.findall(r"`([\w/]+)\.yaml`", cells[0]) if line.startswith("|") else []:
            shows, runs_on = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "") for cell in cells[1:])
            found.update(dict.fromkeys(names, (shows, runs_on)))
    return found


def recipe_named(words: str) -> str | None:
    """Name of the recipe that a name or a path such as `configs/gkd.yaml` means; None if it is not one."""
    name = words.removesuffix(".yaml").removeprefix("./").removeprefix("configs/")
    return name if name in recipes() else None


def write_recipe(words: str, to: Path | None = None) -> Path:
    """Write a recipe with a line on where it is from, and return the file.

    Args: words: as for `recipe_named`; to: a new file; None for one of the recipe's name in the working directory.
    Raises: DataError if there is no such recipe, or the file cannot be written or is there already.
    """
    name = recipe_named(words)
    if name is None:
        close = difflib.get_close_matches(words, recipes(), n=3)
        meant = f"did you mean {' or '.join(close)}?" if close else "`kdray init` lists them"
        raise DataError(f"{words}: no recipe of that name; {meant}")
    target = to or Path(f"{name.rpartition('/')[2]}.yaml")
    head = f"# kdray's recipe {name}, written by `kdray init`, as are the others that it names.\n"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(head + recipes()[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise DataError(f"{target}: is there already, and nothing is overwritten; name another file: --to FILE") from error
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}; name another file: --to FILE") from error
    return target
