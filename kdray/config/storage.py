"""Syntax of storage URLs. They never contain credentials, because they are written into config.yaml."""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from kdray.config.base import is_loopback

_OPTIONS: dict[str, frozenset[str]] = {
    "s3": frozenset({"endpoint_override", "region", "scheme"}),
    "gs": frozenset({"endpoint_override", "project_id", "scheme"}),
    "file": frozenset(),
}
"""Schemes, and the options that each accepts after `?`; none of them holds a secret."""
CREDENTIALS = (
    "credentials come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role for "
    "s3, GOOGLE_APPLICATION_CREDENTIALS for gs"
)


def check_storage_url(url: str) -> str:
    """Return the URL without a trailing slash. Raises: ValueError with the remedy, without repeating possible secrets."""
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise ValueError("run.storage: not a URL; write it like s3://bucket/folder") from error
    known = _OPTIONS.get(parts.scheme)
    # Anywhere in the URL: a secret key may contain slashes, and the text after one is no longer parsed as user info.
    if "@" in url or (":" in parts.netloc and parts.scheme != "file"):
        raise ValueError(
            f"run.storage: the {parts.scheme} URL holds a user name or a key; remove it (an @ of a name is "
            f"written %40): {CREDENTIALS}"
        )
    if known is None:
        named = f"of scheme {parts.scheme!r}" if "://" in url else "without a scheme"
        raise ValueError(
            f"run.storage: a URL {named}; write s3://bucket/folder, gs://bucket/folder or file:///folder, or set run.output to "
            "a folder that every node sees"
        )
    unknown = sorted({name for name, _ in options} - known)
    if unknown:
        allowed = ", ".join(sorted(known)) or "none"
        raise ValueError(f"run.storage: unknown option {', '.join(unknown)}; {parts.scheme} takes {allowed}; {CREDENTIALS}")
    found = dict(options)
    host = urlsplit(f"//{found.get('endpoint_override', '')}").hostname or ""
    if parts.scheme == "gs" and found.get("scheme") == "http" and not is_loopback(host):
        # Google's token goes with every request as it is; those of s3 are signed.
        raise ValueError("run.storage: by plain http the token can be read on the way; remove scheme=http, or use a tunnel")
    if parts.fragment:
        raise ValueError("run.storage: a URL with `#`; write %23 for one that belongs to a name")
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise ValueError(f"run.storage={url}: name a folder by its whole path, as in file:///shared/runs")
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"run.storage={url}: names no bucket; write {parts.scheme}://bucket/folder")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/")))


def below(url: str, *names: str) -> str:
    """Append path components to the folder of a URL; its options are kept."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *(quote(name) for name in names)])))
