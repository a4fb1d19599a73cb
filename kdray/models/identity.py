"""Identity of a model's content, by which a resumed run recognises its models; cheap even for large ones.

A hub model is its resolved commit. A folder is a digest of each file that an engine reads: the whole content of small ones; of
safetensors the size, the header (name, shape and place of every tensor) and the beginning, middle and end of every tensor.
Training or a conversion changes these bytes in every tensor that it touches; a few bytes edited elsewhere are not noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdray.config import Config, ModelSource, PrunedModel, TinyModel
from kdray.errors import DataError
from kdray.models.resolve import calibration_texts, hub_commit, model_config, model_name

COMMIT = "commit"
"""Key of a hub model's resolved commit."""

_READ = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Suffixes of the files that engines and tokenizers read beside the weights."""
_WEIGHTS = ".safetensors"
_COMMIT_ID = re.compile(r"[0-9a-f]{40}")
_HASHED_BYTES = 4096
"""Bytes of each piece of a tensor that are read."""


def model_identity(source: ModelSource, revision: str | None) -> dict[str, str]:
    """Return what identifies the content of a model: part (a file, `commit`, or the settings it is built from) -> value.

    The folder's own path is not part of it, so that a model may be moved.
    Raises: DataError if a file of the model cannot be read.
    """
    if isinstance(source, PrunedModel):
        cuts = source.model_dump(mode="json", exclude={"source", "revision"})
        built = {"settings": _digest(json.dumps(cuts, sort_keys=True).encode())}
        if source.calibration is not None:
            built["calibration texts"] = _digest(json.dumps(list(calibration_texts(source.calibration))).encode())
        return built | model_identity(source.source, source.revision)
    if isinstance(source, TinyModel):
        # Its weights follow from these, up to the rounding of another machine.
        return {"settings": model_name(source)}
    folder = Path(source).expanduser()
    if not folder.is_dir():
        model_config(source, revision)
        return {COMMIT: str(hub_commit(source, revision))}
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (*_READ, _WEIGHTS) and path.is_file()]
    try:
        return {path.name: _sampled(path) if path.suffix == _WEIGHTS else _digest(path.read_bytes()) for path in files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"model {source}: its files cannot be read: {error}; restore the folder") from error


def revision_setting(section: str, model: ModelSource | None) -> str:
    """The setting with a model's commit. Args: section: that has the setting `model`."""
    return f"{section}.model.revision" if isinstance(model, PrunedModel) else f"{section}.revision"


def pinned(config: Config, recorded: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the config with the commits that its models of the hub had, which every later start of an engine or a rank then
    loads, on whatever node, and whatever the repository holds by then.

    Args: recorded: the run's inputs, as `kdray.checks.inputs` finds them and checkpoints record them.
    """

    def of(section: Any, setting: str) -> Any:
        commit = recorded.get(f"{setting}.model", {}).get(COMMIT, "")
        model = getattr(section, "model", None)
        if not _COMMIT_ID.fullmatch(commit) or "revision" not in type(section).model_fields:
            return section
        if isinstance(model, PrunedModel):
            return section.model_copy(update={"model": model.model_copy(update={"revision": commit})})
        return section.model_copy(update={"revision": commit})

    teachers = {name: of(teacher, f"teachers.{name}") for name, teacher in config.teachers.items()}
    return config.model_copy(update={"student": of(config.student, "student"), "teachers": teachers})


def _sampled(path: Path) -> str:
    content = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file")
        text = file.read(size)
        content.update(text)
        header = json.loads(text)
        for name in sorted(header.keys() - {"__metadata__"}):
            start, end = header[name]["data_offsets"]
            for place in (start, (start + end) // 2, max(start, end - _HASHED_BYTES)):
                file.seek(8 + size + place)
                content.update(file.read(min(_HASHED_BYTES, end - place)))
    return content.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
