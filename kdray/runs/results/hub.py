"""Publication of an exported model in a repository of a hub, by the hub's own client.

The client finds the hub (`HF_ENDPOINT`) and the user's token (`HF_TOKEN`, or what `hf auth login` stored); nothing here reads a
token's value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kdray.errors import DataError, HubError

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier model that must not stay beside a new one's: shards of another number would be read along with it."""
_USERS = (400, 401, 403, 404)
"""Answers of a hub that are about what was asked for, and by whom; a repetition would change nothing."""


@dataclass(frozen=True)
class HubRepository:
    """Repository of a model at a hub, and the branch that is written to; the default branch without a revision.

    Raises: DataError for a name that is no repository's.
    """

    repo_id: str
    public: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise DataError(f"--push {self.repo_id}: {error} Give OWNER/NAME") from None
        if "/" not in self.repo_id:
            raise DataError(
                f"--push {self.repo_id}: names no owner; give OWNER/NAME, with your user's name or an organisation's"
            )

    def prepare(self) -> None:
        """Make the repository and the branch where they are missing, and check that the model may be written there.

        Raises: DataError without a token or permission, or if a repository that exists is visible to others than was said;
            HubError if the hub cannot be reached or fails.
        """
        from huggingface_hub import HfApi

        with self._explained():
            self._check_token()
            api = HfApi()
            api.create_repo(self.repo_id, private=not self.public, exist_ok=True)
            private = api.model_info(self.repo_id).private
            if not private and not self.public:
                raise DataError(
                    f"--push {self.repo_id}: this repository is public, so that everyone could read the model; add --public if "
                    "that is meant, or name another one"
                )
            if private and self.public:
                raise DataError(
                    f"--public: {self.repo_id} is private, and stays so; remove --public, or change it in the repository's "
                    "settings at the hub first"
                )
            if self.revision is not None and not self.revision.startswith("refs/"):
                api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def upload(self, model: Path, message: str) -> str:
        """Write all files of a model's folder to the repository, in place of an earlier model's, and return the commit's URL.

        Args: message: of the commit.
        Raises: as `prepare`.
        """
        from huggingface_hub import HfApi

        with self._explained():
            found = HfApi().upload_folder(
                repo_id=self.repo_id,
                folder_path=model,
                commit_message=message,
                revision=self.revision,
                delete_patterns=_WEIGHTS,
            )
            return str(found.commit_url)

    def _check_token(self) -> None:
        from huggingface_hub import constants, get_token

        if constants.is_offline_mode():
            raise DataError(f"--push {self.repo_id}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to reach the hub")
        if get_token() is None:
            raise DataError(
                f"--push {self.repo_id}: no token for the hub was found; log in with `hf auth login`, or set HF_TOKEN to one "
                "that may write"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the client raises into errors with a remedy."""
        from huggingface_hub import constants

        # The client's own HTTP library, whichever that is in its version.
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        try:
            yield
        except (DataError, HubError):
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
                # An upload's own error says only which file it was.
                cause = cause.__cause__
            what = f"--push {self.repo_id}: {constants.ENDPOINT}"
            if not isinstance(cause, HfHubHTTPError):
                reason = " ".join(f"{type(cause).__name__}: {cause}".split())
                raise HubError(
                    f"{what} could not be reached, or broke off: {reason}; check the network, proxies and HF_ENDPOINT, and try "
                    "again"
                ) from error
            status = cause.response.status_code
            reason = cause.server_message or " ".join(str(cause).split())
            told = f"{what} answered {status}: {reason}"
            if status in _USERS:
                raise DataError(f"{told}; {self._remedy(status)}") from error
            raise HubError(f"{told}; try again later") from error

    def _remedy(self, status: int) -> str:
        owner = self.repo_id.split("/")[0]
        if status == 401:
            return "log in anew with `hf auth login`, or set HF_TOKEN to a token that is valid there"
        if status == 403:
            return f"use a token that may write to repositories of {owner}, or name one of your own"
        return "check the names of repository and --revision"
