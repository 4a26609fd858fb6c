"""sort_letters: `qzbxaf>` -> `abfqxz`. Learns in minutes on two cores, long enough to show a mismatch."""

from __future__ import annotations

from pydantic import Field

from lpexp.task.generated import Letters


class SortLetters(Letters):
    """Write the letters in alphabetical order."""

    length: int = Field(6, ge=4, le=10)

    def solve(self, text: str) -> str:
        return "".join(sorted(text[:-1]))
