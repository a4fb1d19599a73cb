"""Inputs of a run beyond its settings (data, tokenizer, models), recorded in every checkpoint and compared by a resume.

A setting names a file or a hub repository; what is there may change while the name stays. Versions of libraries are compared,
too, but a different version is reported, not refused: a cluster that was restarted may have a newer image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdray.config import Config
from kdray.config.resuming import Change
from kdray.errors import ConfigError
from kdray.models.identity import COMMIT, model_identity, revision_setting
from kdray.runs.context import Checked, installed_versions
from kdray.teachers.kind import kind_of
from kdray.types import Prompt

Inputs = dict[str, dict[str, Any]]
"""Setting -> part -> recorded value, as JSON types: `{"student.model": {"config.json": "9f86d081884c7d65"}}`."""

_ANSWERS = ".path"
"""End of the setting of a teacher's recorded answers."""
_SHOWN = 4
"""Maximum number of differing parts of one setting that a message lists."""
_GIT_S = 5.0


def inputs_of(checked: Checked) -> Inputs:
    """Return what the run reads, as it is now. Raises: DataError if a model's files cannot be read."""
    config = checked.config
    tokenizer = checked.tokenizer
    found: Inputs = {
        "data.prompts": _prompts(checked.dataset.train),
        "held-out prompts": _prompts(checked.dataset.heldout),
        # Without the library's own serialisation, which differs between versions of it: what it does shows in the prompts.
        "tokenizer": {
            "vocabulary": _digest(sorted(tokenizer.get_vocab().items())),
            "special tokens": _digest({name: str(token) for name, token in tokenizer.special_tokens_map.items()}),
        },
        "chat template": {"text": _digest(tokenizer.chat_template)},
        "student.model": dict(model_identity(config.student.model, config.student.revision)),
    }
    if checked.windows:
        found["training.pretraining"] = _prompts(checked.windows)
    for name in config.teachers:
        kind = kind_of(config, name)
        if kind.model is not None:
            found[f"teachers.{name}.model"] = dict(model_identity(*kind.model))
        if answers := kind.recorded_answers():
            found[f"teachers.{name}{_ANSWERS}"] = answers
    return found


def check_inputs(config: Config, recorded: Mapping[str, Mapping[str, Any]], now: Inputs, versions: Mapping[str, Any]) -> None:
    """Compare a run's inputs with those that its checkpoint recorded.

    Args: config: that of the resume; versions: changed versions of libraries, which may be the cause.
    Raises: ConfigError that lists each difference with the recorded value, the value now, and the remedies.
    """
    told = []
    for setting in sorted(recorded.keys() | now.keys()):
        if setting.endswith(_ANSWERS) and setting not in recorded:
            # Checkpoints of earlier versions have none.
            continue
        old, new = recorded.get(setting, {}), now.get(setting, {})
        parts = [part for part in sorted(old.keys() | new.keys()) if old.get(part) != new.get(part)]
        shown = [f"{part} was {old.get(part, 'absent')}, now {new.get(part, 'absent')}" for part in parts[:_SHOWN]]
        if len(parts) > _SHOWN:
            shown.append(f"and {len(parts) - _SHOWN} more")
        if parts:
            told.append(f"{setting}: {', '.join(shown)}{_remedy(config, setting, old)}")
    if told:
        cause = f" (since then {_changed(versions)}, which may be the cause)" if versions else ""
        raise ConfigError(
            f"the run to resume has read other inputs than there are now: {'; '.join(told)}{cause}. Put back what the run "
            "began with, or choose another run.name"
        )


def check_revisions(recorded: Mapping[str, Any] | None, found: Iterable[Change]) -> None:
    """Check that another `revision` can be compared with the checkpoint. Raises: ConfigError naming the setting."""
    for each in found:
        if recorded is None and each.setting.endswith(".revision"):
            raise ConfigError(
                f"{each.setting}: {each.old} there, {each.new} now, but the checkpoint is of an earlier version of kdray and "
                "does not tell the commit that it was trained with: set it back, or choose another run.name"
            )


def installation(checked: Checked) -> dict[str, Any]:
    """Return where and with what the run is computed: versions of packages and plugins, kdray's git commit if known, host, and
    the working directory, from which the config's relative paths count."""
    where = {"host": socket.gethostname(), "directory": str(Path.cwd())}
    return {**installed_versions(checked.config), "commit": _commit(), **where}


def changed_versions(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the packages, plugins and commit that differ between two installations, as [recorded, now]; None if absent."""
    before, after = _flat(recorded), _flat(now)
    names = sorted(before.keys() | after.keys())
    return {name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)}


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    commit = {} if found.get("commit") is None else {"kdray's commit": found["commit"]}
    return {**found.get("versions", {}), **found.get("plugins", {}), **commit}


def _changed(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} went from {old} to {new}" for name, (old, new) in versions.items())


def _remedy(config: Config, setting: str, old: Mapping[str, Any]) -> str:
    """What to set for a hub repository that moved on; empty where nothing is known to help."""
    if setting.endswith(".model") and COMMIT in old:
        section = setting.removesuffix(".model")
        holder: Any = config.student if section == "student" else config.teachers.get(section.removeprefix("teachers."))
        if holder is None or "revision" not in type(holder).model_fields:
            # A teacher of another recipe, or one that follows the student, whose own line says what to set.
            return ""
        return f" (set {revision_setting(section, holder.model)}={old[COMMIT]})"
    read: dict[str, Any] = {"data.prompts": config.data.prompts, "held-out prompts": config.data.prompts}
    if config.training.pretraining is not None:
        read["training.pretraining"] = config.training.pretraining.source
    if setting in read and "revision" in type(read[setting]).model_fields:
        name = "data.prompts" if setting != "training.pretraining" else f"{setting}.source"
        return f" (set {name}.revision to the dataset's commit of that time, if it has changed since)"
    return ""


def _prompts(prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Rows and digest of prompts as encoded, in their order, with all that grades, answers or routes them."""
    content, rows = hashlib.sha256(), 0
    for prompt in prompts:
        rows += 1
        asked = [prompt.prompt_id, prompt.question, prompt.answer, prompt.reply, prompt.domain, dict(prompt.template_kwargs)]
        # Not the answer's tokens, which are there only where a phase trains on them: a resume may add the control.
        content.update(json.dumps([asked, prompt.token_ids.tolist()], sort_keys=True, default=str).encode())
    return {"rows": rows, "content": content.hexdigest()[:16]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _commit() -> str | None:
    """The commit of kdray's own git checkout, with `+` if files of it differ; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head, state = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=_GIT_S).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
        return head.strip() + ("+" if state.strip() else "")
    return None
