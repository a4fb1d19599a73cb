"""A look at the hub before anything is downloaded: a wrong name or a missing network is told in seconds, in one sentence.

The libraries that download try again for most of a minute, and their message speaks of connections even where a folder's name
is misspelt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

from kdray.errors import ConfigError, DataError

_Kind = Literal["model", "dataset"]
_PATIENCE_S = 10.0


_PLACEHOLDER = "models/"
"""Folder of the models in recipes that are for models of one's own."""


def check_model_on_hub(name: str, revision: str | None, setting: str = "") -> None:
    """Check that the hub has a model, or this machine's cache does. Nothing is asked about a folder.

    Args: setting: that names it. Raises: ConfigError if it is not there, or the hub does not answer.
    """
    if Path(name).is_dir():
        return
    if (problem := _problem("model", name, revision)) is not None:
        what = f"{setting}={name}" if setting else f"model {name!r}"
        hint = ""
        if name.startswith(_PLACEHOLDER):
            hint = f"; in a recipe it only stands for a model of yours: set {setting or 'it'}=FOLDER, or to a hub id"
        raise ConfigError(f"{what}: {problem}{hint}")


def check_dataset_on_hub(name: str, revision: str | None, setting: str) -> None:
    """Check that the hub has a dataset, or this machine's cache does. Nothing is asked about a file or folder.

    Args: setting: that names it. Raises: DataError as `check_model_on_hub`.
    """
    if not Path(name).exists() and (problem := _problem("dataset", name, revision)) is not None:
        raise DataError(f"{setting}={name}: {problem}")


@cache
def _problem(kind: _Kind, name: str, revision: str | None) -> str | None:
    """Reason and remedy where the hub or the cache does not have it; None if one of them does. Nothing is asked for twice."""
    from huggingface_hub import HfApi, constants, errors

    if _CACHED[kind](name, revision):
        return None
    hub = constants.ENDPOINT
    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=_PATIENCE_S)
    except errors.RevisionNotFoundError:
        return f"{hub} has no revision {revision} of it; correct the revision, or leave it out"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return (
            f"there is no such folder here, and {hub} has no such {kind}, or none that may be read without logging in; "
            "correct the name, or log in (hf auth login, or HF_TOKEN)"
        )
    except errors.OfflineModeIsEnabled:
        return (
            "there is no such folder here, it is not in the hub's cache on this machine, and HF_HUB_OFFLINE forbids to "
            "download it; name an existing folder, or unset HF_HUB_OFFLINE"
        )
    except errors.HfHubHTTPError:
        # A mirror need not answer this question; whoever downloads says what is wrong.
        return None
    except (OSError, errors.HTTPError) as error:
        return (
            f"there is no such folder here, it is not in the hub's cache on this machine, and {hub} does not answer: "
            f"{str(error).strip() or repr(error)}; name an existing folder, or try again with a network (HF_ENDPOINT names a "
            "mirror)"
        )
    return None


def _model_is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except errors.HFValidationError:
        return False


def _dataset_is_cached(name: str, revision: str | None) -> bool:
    from datasets import config

    # The datasets library joins owner and name with underscores, and puts some more between words of the name.
    wanted = name.replace("/", "").replace("_", "").lower()
    folder = Path(config.HF_DATASETS_CACHE)
    return folder.is_dir() and any(each.name.replace("_", "").lower() == wanted for each in folder.iterdir())


_CACHED: dict[_Kind, Callable[[str, str | None], bool]] = {"model": _model_is_cached, "dataset": _dataset_is_cached}
