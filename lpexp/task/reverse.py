"""reverse: `abcdefgh>` -> `hgfedcba`. RL lifts it from a third to nine tenths: the task of the learning gate."""

from __future__ import annotations

from pydantic import Field

from lpexp.task.generated import Letters


class Reverse(Letters):
    """Write the letters backwards."""

    length: int = Field(8, ge=2, le=16)

    def solve(self, text: str) -> str:
        return text[-2::-1]
