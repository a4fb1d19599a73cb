"""The token that a Ray cluster asks for: where this user's is, and what to do about one that the cluster does not take."""

from __future__ import annotations

import os
from pathlib import Path

from kdray.errors import ConfigError


def token_source() -> str | None:
    """Location where Ray finds this user's token; None if there is none."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    return "~/.ray/auth_token" if (Path.home() / ".ray" / "auth_token").is_file() else None


def token_refused(cluster: str, is_wrong: bool) -> ConfigError:
    """Why a cluster that asks for a token did not take this user's, with the remedy. Args: is_wrong: a token was sent."""
    source = token_source()
    if is_wrong:
        return ConfigError(
            f"{source}: the token is not that of the cluster at {cluster}; take the one that its head was started with (on the "
            "head: ray get-auth-token)"
        )
    mode = os.environ.get("RAY_AUTH_MODE")
    if source is not None and mode != "token":
        said = "RAY_AUTH_MODE: not set, and" if mode is None else f"RAY_AUTH_MODE={mode}:"
        return ConfigError(f"{said} the cluster at {cluster} asks for a token; set it to token, which sends that of {source}")
    if source == "RAY_AUTH_TOKEN_PATH":
        return ConfigError(f"RAY_AUTH_TOKEN_PATH={os.environ[source]}: holds no token; write the cluster's into the file")
    return ConfigError(
        f"RAY_AUTH_TOKEN: not set, and the cluster at {cluster} asks for a token; set it to the one that its head was started "
        "with (on the head: ray get-auth-token), or RAY_AUTH_TOKEN_PATH to a file that holds it, and RAY_AUTH_MODE to token"
    )
