"""What can go wrong, and whose turn it is.

PerennialError            anything we can explain: found, expected, next command
├── ProjectError          the model project is not as the contract wants it (its developer acts)
├── DataError             the data is not fit to train on
├── ChildFailed           a process of the project failed, hung or was killed
├── ReleaseError          a release is unknown, rejected, altered or incomplete
├── RolloutError          a candidate could not be put in front of users; the old release serves on
└── InstallationError     a part of Perennial itself is missing, taken or of another version
"""

from __future__ import annotations


class PerennialError(Exception):
    """An error with an explanation: what was found, what was expected, what to run next.

    `transient`: the cause is a part on the network that may answer in a moment; worth another try.
    """

    def __init__(
        self, found: str, expected: str = "", next_command: str = "", *, transient: bool = False
    ) -> None:
        self.transient = transient
        self.found = found
        self.expected = expected
        self.next_command = next_command
        lines = [found]
        if expected:
            lines.append(f"Expected: {expected}")
        if next_command:
            lines.append(f"Next: {next_command}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[PerennialError], tuple[str, str, str], dict[str, bool]]:
        return type(self), (self.found, self.expected, self.next_command), {"transient": self.transient}


class ProjectError(PerennialError):
    """The model project is not as the contract wants it."""


class DataError(PerennialError):
    """The data is not fit to train on."""


class ChildFailed(PerennialError):
    """A process that runs a project's code failed, hung past its limit or was killed."""


class ReleaseError(PerennialError):
    """A release is unknown, rejected, altered or incomplete."""


class RolloutError(PerennialError):
    """A candidate could not be put in front of users; the old release serves on."""


class InstallationError(PerennialError):
    """A part of Perennial itself is missing, taken or of another version."""
