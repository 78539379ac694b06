"""Every error a person can meet. One line each: where, what was found, what was expected, what to do."""

from __future__ import annotations

import errno
import reprlib

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80

KEPT = "; what is merged is kept, go on with --resume"
"""The end of a message about a merge that was stopped."""


def brief(value: object) -> str:
    """A value as messages show it: one short line, whatever its size or depth."""
    try:
        return _REPR.repr(value)[:100]
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"


def reason(error: OSError) -> str:
    """Why the system refused; with the remedy where the limit is the process's own."""
    said = error.strerror or str(error)
    return f"{said}; raise the limit with ulimit -n" if error.errno == errno.EMFILE else said


def cannot_read(e: OSError) -> str:
    """Why a file or folder cannot be read, and what to do."""
    remedy = "look at the file and its disk"
    if e.errno in (errno.EACCES, errno.EPERM):
        remedy = "give yourself the permission (chmod u+rX)"
    elif e.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        remedy = "correct the path"
    elif e.errno == errno.EMFILE:
        return f"cannot be read: {reason(e)}"
    return f"cannot be read: {e.strerror or e}; {remedy}"


def one_line(message: str) -> str:
    """A message as it is shown: one printable line of at most 1000 characters."""
    return _shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in _shortened(message)))


def _shortened(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:500]}...{text[-497:]}"


class SemeError(ValueError):
    """A mistake in the recipe, the checkpoints or the call; exit code 2 on the command line.

    The message is one printable line, whatever names and values are in it.

    Attributes:
        fault: no mistake, but a machine that failed: a full disk, a file that vanished; exit code 1. What was merged
            until then is kept for ``--resume``.
    """

    def __init__(self, message: str, *, fault: bool = False) -> None:
        self.fault = fault
        super().__init__(one_line(message))


class ConfigError(SemeError):
    """The recipe is wrong; the message starts with the path of the entry, e.g. ``models[1].parameters.weight``."""


class CheckpointError(SemeError):
    """A checkpoint is missing, truncated, hostile, or does not fit the others; the message names the file."""


class OpError(SemeError):
    """An op was called with arguments it cannot accept; the message starts with the op's name."""


class BackendError(SemeError):
    """A backend was asked for that does not work here; the message says why and what to do."""


class TargetError(SemeError):
    """The output folder cannot be used: not empty, inside a source, no space, no permission."""


class LateInterrupt(KeyboardInterrupt):
    """An interrupt that came when the new model was in place already."""


class KeptInterrupt(KeyboardInterrupt):
    """An interrupt after which what was merged is kept for ``--resume``."""
