"""Errors that kdray raises on purpose.

To add one: subclass `KdrayError` *and* the standard class a caller would expect, and take a single message argument.
Errors cross Ray actors by pickle; an `__init__` with more arguments does not survive the trip.
"""


class KdrayError(Exception):
    """Base of every error raised on purpose. The message alone must tell the user what to change."""


class ConfigError(KdrayError, ValueError):
    """A setting is wrong: the command exits with 2 before anything starts."""


class DataError(KdrayError, ValueError):
    """An input file, dataset or tokenizer is wrong: the command exits with 2 before anything starts."""


class VocabError(DataError):
    """Teacher and student do not agree on what a token id means."""


class CapacityError(ConfigError):
    """The cluster can never give what the config asks for."""


class EngineError(KdrayError, RuntimeError):
    """A serving engine failed, or answered something that cannot be trusted."""


class RequestRefused(EngineError):
    """A request that no replica could ever serve; sending it again would not help."""


class TeacherGone(EngineError):
    """A teacher has no replica left that could answer, or none that may: its canary no longer matches."""


class SignalError(EngineError):
    """A teacher's answers teach nothing, or the loss does not read them."""


class ResponseError(KdrayError, RuntimeError):
    """A grader or a filter failed on a response, which is then neither right nor wrong."""


class TrainingError(KdrayError, RuntimeError):
    """The student group failed, or its loss stopped being a finite number."""


class StorageError(KdrayError, OSError):
    """`run.storage` could not be read or written, and waiting did not help."""


class Interrupted(KdrayError):
    """The user asked the run to stop; a checkpoint was written: the command exits with 130."""


def first_reason(error: BaseException) -> BaseException:
    """The first error inside nested exception groups: the others followed from it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
