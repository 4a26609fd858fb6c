"""add: `12+34=` -> `46`. Prompts and answers of different lengths; slow to warm up, so it serves tests."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from lpexp.task import words
from lpexp.task.generated import Generated


class Add(Generated):
    """Add two numbers below 10**digits."""

    digits: int = Field(2, ge=1, le=9)

    def size(self) -> int:
        return 100**self.digits

    def texts(self) -> Iterator[str]:
        numbers = range(10**self.digits)
        return (f"{a}+{b}=" for a in numbers for b in numbers)

    def draw(self, *key: object) -> str:
        a, b = (word % 10**self.digits for word in words(2, *key).tolist())
        return f"{a}+{b}="

    def solve(self, text: str) -> str:
        return str(sum(int(number) for number in text[:-1].split("+")))

    def longest(self) -> tuple[int, int]:
        return 2 * self.digits + 2, self.digits + 1
