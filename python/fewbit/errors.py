"""Every error that a user can trigger: one sentence with cause, value and what is allowed.

The command line turns ``exit_code`` into the process's exit status: 2 wrong use, 3 stopped but
resumable, 4 not supported.
"""


class FewbitError(Exception):
    """Base class; the message is one sentence that a user can act on."""

    exit_code = 2


class UsageError(FewbitError, ValueError):
    """An argument is wrong: the message names it, its value, and what is allowed."""


class CalibrationError(FewbitError, ValueError):
    """The calibration input is missing, too short, empty or not finite."""


class CheckpointError(FewbitError, ValueError):
    """A model directory or a file in it is missing, damaged, hostile or of another format."""


class MissingExtraError(FewbitError, ImportError):
    """An optional dependency is needed; the message gives the install command."""


class TransformError(FewbitError):
    """A function-preserving transform changed the function beyond its bound."""


class UnsupportedError(FewbitError):
    """A model family, format or combination that fewbit refuses by name rather than guesses."""

    exit_code = 4


class ResumableStop(FewbitError):
    """The run stopped before its end, and the same command goes on from there."""

    exit_code = 3
