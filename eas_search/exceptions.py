"""Errors that a user can cause.

Each message is one line that names the value, what was expected and the next step. The command line prints that
line and leaves with exit code 2; everything else is a defect of ours and keeps its traceback.
"""


class EasSearchError(Exception):
    """Base of every error that a user can cause and cure."""


class ConfigError(EasSearchError, ValueError):
    """A setting, flag or configuration file has a value that cannot be used."""


class UnsupportedModelError(EasSearchError):
    """A model, or one of its blocks, does not match any declared pattern."""


class TaskDataError(EasSearchError):
    """A task's data is missing, malformed or does not fit the model."""


class StorageError(EasSearchError):
    """A study storage or output folder cannot be read, written or resumed."""


class VerificationError(EasSearchError):
    """Two models that must agree do not, or a file is not what its manifest says.

    `report` carries the measured differences when the comparison got that far.
    """

    def __init__(self, message: str, report: object | None = None) -> None:
        super().__init__(message)
        self.report = report
