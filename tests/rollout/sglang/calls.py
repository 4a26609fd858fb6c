"""Calls to a server that are made of the real one (record.py) and replayed to the client without it (test_client.py).

They run in this order, on a server that holds the random start of the model `MODEL` and has just been given version 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lpexp.rollout import Sampling
from lpexp.rollout.sglang.client import Client

MODEL = ("model=qwen3_tiny", "precision=fp32", "seed=1")
PROMPT, STOP = (5, 6, 7, 8, 3), 2
BIASED = {"temperature": 1e-4}  # so cold that the most probable token is drawn


def ask(client: Client, names: list[str], longest: int = 6, **how: Any) -> list[Any]:
    answers = client.generate(PROMPT, names, Sampling(**how), longest, STOP, 60)
    return [(a.tokens_T.tolist(), [round(float(x), 5) for x in a.logprobs_T], a.finish, a.version) for a in answers]


def stopping(client: Client) -> list[Any]:
    """The same prompt with a stop token that it will draw first."""
    (answer,) = ask(client, ["stop.0"], temperature=0.0)
    first = answer[0][0]
    (answer,) = client.generate(PROMPT, ["stop.1"], Sampling(temperature=0.0), 6, first, 60)
    return [answer.tokens_T.tolist() == [first], answer.finish]


def score(client: Client) -> list[float]:
    return [round(float(x), 5) for x in client.score([PROMPT, PROMPT[:3]])]


CALLS: dict[str, Callable[[Client], Any]] = {
    "a group": lambda client: ask(client, ["group.0", "group.1"], temperature=1.0),
    "greedy": lambda client: ask(client, ["greedy"], temperature=0.0),
    "cut": lambda client: ask(client, ["cut"], temperature=0.7, top_p=0.9, top_k=5),
    "a stop token": stopping,
    "scores": score,
    "an option that is none": lambda client: ask(client, ["wrong"], temperature=1.0, longest=-1),
    "too long a prompt": lambda client: client.score([PROMPT * 200]),
    "abort of nothing": lambda client: client.abort(["nobody"]),
    "health": lambda client: client.healthy(30),
    "checksums": lambda client: [len(client.checksums(60)), sorted(client.checksums(60)[0])[:3]],
    "a directory that is not there": lambda client: client.load_directory("/nonexistent", 3, 60),
    "an update that was not begun": lambda client: client.load_tensors([b"\x80"], 3, 60),
    "begun twice": lambda client: [client.begin(60), client.begin(60)],
    "tensors that are none": lambda client: client.load_tensors([b"\x80\x04N."], 3, 60),
    "ended": lambda client: client.end(60),
    "ended twice": lambda client: client.end(60),
    "a group that is not there": lambda client: client.leave("nobody"),
    "paused, flushed, resumed": lambda client: [client.pause(), client.flush(), client.proceed()],
}


def outcome(call: Callable[[Client], Any], client: Client) -> list[Any]:
    """What came of a call, as JSON holds it: its value, or the kind and text of its error."""
    try:
        return ["value", call(client)]
    except Exception as error:
        return [type(error).__name__, str(error)]
