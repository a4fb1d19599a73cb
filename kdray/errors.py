"""Errors that kdray raises on purpose.

To add one: subclass `KdrayError` *and* the standard class a caller would expect, and take a single message argument.
Errors cross Ray actors by pickle; an `__init__` with more arguments does not survive the trip.
"""

import os


class KdrayError(Exception):
    """Base of every error raised on purpose. The message alone must tell the user what to change."""


class ConfigError(KdrayError, ValueError):
    """A setting is wrong: the command exits with 2 before anything starts."""


class DataError(KdrayError, ValueError):
    """An input file, dataset or tokenizer is invalid: the command exits with 2 before anything starts."""


class VocabError(DataError):
    """Teacher and student disagree on the meaning of a token id."""


class Unavailable(KdrayError):
    """Something outside of the run, which it needs, is away: the same command may succeed later."""


class AwayError(Unavailable, ConfigError):
    """What a setting names does not answer at the start, or is in another driver's hands."""


class CapacityError(Unavailable, ConfigError):
    """The cluster, as it is now, cannot provide what the config requires."""


class EngineError(KdrayError, RuntimeError):
    """A serving engine failed, or returned a result that cannot be trusted."""


class EndpointAway(Unavailable, EngineError):
    """A remote teacher did not answer, or answered that it cannot now, in every attempt."""


class RequestRefused(EngineError):
    """A request that no replica can serve; retrying would not help."""


class TeacherGone(EngineError):
    """A teacher has no replica left that can answer, or none that may, because its canary no longer matches."""


class SignalError(EngineError):
    """A teacher's answers carry no signal, or the loss does not read them."""


class ResponseError(KdrayError, RuntimeError):
    """A grader or a filter failed on a response, which is then neither right nor wrong."""


class TrainingError(KdrayError, RuntimeError):
    """The student group failed, or its loss was no longer finite."""


class NoRoomForRanks(Unavailable, TrainingError):
    """Ranks that were lost did not start again: no node may have room for them."""


class StorageError(Unavailable, OSError):
    """`run.storage` could not be read or written, even after retries."""


class HubError(KdrayError, OSError):
    """The hub that a model is pushed to could not be reached, or failed."""


class LeaseLost(KdrayError, RuntimeError):
    """Another driver has taken over the run; this one writes nothing more."""


class Interrupted(KdrayError):
    """The user asked the run to stop; a checkpoint was written: the command exits with 130."""


def exit_code(error: BaseException | None) -> int:
    """Exit code of a command that this ended: 0 for None, 2 for a wrong config or input, 130 if interrupted, 1 otherwise."""
    if error is None:
        return 0
    reason = first_reason(error)
    if isinstance(reason, KeyboardInterrupt | Interrupted):
        return 130
    return 2 if isinstance(reason, ConfigError | DataError) else 1


SUPERVISED = "KDRAY_SUPERVISED"
"""Environment variable of a run that a supervisor has started."""
MAY_PASS = 64
"""What such a run adds to its exit code where its reason may pass by itself."""


def ended_with(error: BaseException | None) -> int:
    """Exit code that this process ends with: `exit_code`, and in a supervised run whether the reason may pass."""
    may_pass = error is not None and isinstance(first_reason(error), Unavailable) and SUPERVISED in os.environ
    return exit_code(error) + (MAY_PASS if may_pass else 0)


def first_reason(error: BaseException) -> BaseException:
    """Return the first error inside nested exception groups, which caused the others."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
