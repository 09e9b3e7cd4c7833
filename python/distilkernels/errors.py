"""Exceptions of the package. Bad arguments raise ``ValueError`` or ``TypeError``; these are the others."""


class BackendError(RuntimeError):
    """A requested backend cannot serve a call; the message is the sentence that says why."""
