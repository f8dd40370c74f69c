# SPDX-License-Identifier: Apache-2.0
"""The two ways a command ends badly: bad input (exit status 2) and a failed check (exit status
1)."""


class UserError(Exception):
    """Bad input: a missing file, an unknown key, a malformed record. One clear line, exit status
    2."""


class DataError(UserError):
    """A malformed record, reported as `FILE:LINE: reason`."""

    def __init__(self, file: str, line: int, reason: str):
        super().__init__(f"{file}:{line}: {reason}")
        self.file, self.line, self.reason = file, line, reason


class RunError(Exception):
    """The run itself broke: a non-finite loss, a full disk. One clear line, exit status 1."""
