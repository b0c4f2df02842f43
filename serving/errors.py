"""What can go wrong inside a model's environment.

ContractError       the project or its data is not as the contract wants it; goes into `Result.error`
└── ArtifactRefused a saved model holds something that is not on the list of what may be loaded
BadRequest          a client's request cannot be answered; becomes a 4xx
"""

from __future__ import annotations


class ContractError(Exception):
    """What was found, what was expected, and where."""

    def __init__(self, found: str, expected: str = "", where: str = "") -> None:
        self.found = found
        self.expected = expected
        self.where = where
        parts = [f"{where}: {found}" if where else found]
        if expected:
            parts.append(f"Expected: {expected}")
        super().__init__("\n".join(parts))


class ArtifactRefused(ContractError):
    """A saved model holds something that is not on the list of what may be loaded."""


class BadRequest(Exception):
    """A request that gets a 4xx: `reason` in one sentence, and the details a client can act on."""

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        row: int | None = None,
        column: str | None = None,
        found: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
        retry_after_seconds: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.close = close
        self.retry_after_seconds = retry_after_seconds
        details = {"row": row, "column": column, "found": found, "expected": expected, "nearest": nearest}
        self.details: dict[str, object] = {
            name: value for name, value in details.items() if value is not None
        }
