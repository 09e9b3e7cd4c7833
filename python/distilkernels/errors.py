"""Exceptions of the package. Bad arguments raise ``ValueError`` or ``TypeError``; these are the others."""


class BackendError(RuntimeError):
    """A requested backend cannot serve a call; the message is the sentence that says why."""


class StoreError(RuntimeError):
    """A store of teacher rows that is damaged, locked or cannot be written.

    Attributes:
        file: path of the file concerned, a str, or None.
        offset: byte offset in that file where the damaged or unwritten part starts, or None.
    """

    def __init__(self, message: str, file: object = None, offset: int | None = None):
        super().__init__(message, None if file is None else str(file), offset)
        self.file = self.args[1]
        self.offset = offset

    def __str__(self) -> str:
        if self.file is None:
            return self.args[0]
        where = self.file if self.offset is None else f"{self.file}, byte {self.offset}"
        return f"{where}: {self.args[0]}"
