"""Reward functions that the tests of task=prompts name by import path."""

NOT_A_FUNCTION = 3


def length(prompt: str, answer: str, label: str) -> float:
    return float(len(prompt) * 100 + len(answer) * 10 + len(label))


def same(prompt: str, answer: str, label: str) -> bool:
    return answer == label


def broken(prompt: str, answer: str, label: str) -> float:
    """Right about the empty answer only."""
    if answer:
        raise KeyError(prompt)
    return 1.0


def leaves(prompt: str, answer: str, label: str) -> float:
    raise SystemExit(0)


def nothing(prompt: str, answer: str, label: str) -> float | None:
    return None if answer else 1.0
