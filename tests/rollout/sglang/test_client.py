"""The client against recorded answers of a real server: what it asks, and what it makes of what comes back."""

from __future__ import annotations

import copy
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from lpexp.errors import EngineLost
from lpexp.model.decoder import initial_tensors
from lpexp.precision.wire import ship
from lpexp.rollout.sglang import TESTED
from lpexp.rollout.sglang.client import Client, Refused, Unreachable, read_answers, read_checksums, read_scores
from lpexp.rollout.sglang.held import expectations
from tests.rollout.sglang.calls import CALLS, outcome
from tests.rollout.sglang.conftest import LOCKED

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded.json").read_text())


class Replayed(Client):
    """A client that hears what a real server once answered to exactly these requests."""

    def __init__(self, heard: list[dict[str, Any]]):
        super().__init__("127.0.0.1", 1, "no key")
        self.left = copy.deepcopy(heard)

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, bytes]:
        one = self.left.pop(0)
        assert (method, path, json.loads(json.dumps(body))) == (one["method"], one["path"], one["body"])
        answer = one["answer"]
        return one["status"], (answer if isinstance(answer, str) else json.dumps(answer)).encode()


@pytest.mark.parametrize("call", CALLS)
def test_the_client_asks_as_was_recorded_and_reads_the_answer_alike(call: str) -> None:
    kept = RECORDED["calls"][call]
    client = Replayed(kept["heard"])
    assert json.loads(json.dumps(outcome(CALLS[call], client))) == kept["outcome"]
    assert client.left == []


def test_the_answers_were_recorded_of_the_server_that_the_lock_pins() -> None:
    assert RECORDED["versions"]["sglang"] == TESTED == LOCKED


def test_refusals_and_values_were_both_recorded() -> None:
    kinds = {name: kept["outcome"][0] for name, kept in RECORDED["calls"].items()}
    assert kinds["a group"] == kinds["scores"] == kinds["health"] == "value"
    assert kinds["a directory that is not there"] == kinds["an update that was not begun"] == Refused.__name__
    assert kinds["begun twice"] == kinds["ended twice"] == kinds["too long a prompt"] == Refused.__name__


@pytest.mark.parametrize("name", RECORDED["held"])
def test_the_hashes_that_a_server_reports_are_those_of_what_it_was_sent(name: str) -> None:
    from lpexp import frontend

    model, precision = name.split()
    exp = frontend.experiment(f"model={model}", f"precision={precision}")
    card = exp.model.sized()
    parts = {p.name: made for p, made in ship(initial_tensors(card, 1), card.params(), exp.wire, False)}
    (expected,) = expectations(parts, card, exp.wire, "cpu", 1, 1)
    assert {parameter: wants for parameter, (wants, _) in expected.items()} == RECORDED["held"][name]
    changed = parts["model.layers.1.mlp.up_proj.weight"]["weight"]
    changed[3, 5] += 1
    (other,) = expectations(parts, card, exp.wire, "cpu", 1, 1)
    wrong = [parameter for parameter, (wants, _) in other.items() if wants != RECORDED["held"][name][parameter]]
    assert wrong == ["model.layers.1.mlp.gate_up_proj.weight"]
    assert other[wrong[0]][1].startswith("mlp_up: model.layers.1.mlp.gate_proj.weight")


def answered() -> Any:
    return copy.deepcopy(RECORDED["calls"]["a group"]["heard"][0]["answer"])


def broken(change: Any) -> Any:
    made = answered()
    change(made)
    return made


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        [],
        {"error": "no"},
        answered()[:1],
        answered()[::-1],
        broken(lambda a: a[0].pop("output_ids")),
        broken(lambda a: a[1]["output_ids"].pop()),
        broken(lambda a: a[1]["meta_info"].pop("weight_versions")),
        broken(lambda a: a[0]["meta_info"]["output_token_logprobs"].pop()),
        broken(lambda a: a[0]["meta_info"]["output_token_logprobs"][0].__setitem__(0, None)),
        broken(lambda a: a[0]["meta_info"]["output_token_logprobs"][0].__setitem__(0, float("nan"))),
        broken(lambda a: a[0]["meta_info"]["output_token_logprobs"][0].__setitem__(0, 0.5)),
        broken(lambda a: a[0]["meta_info"]["output_token_logprobs"][0].__setitem__(1, 63)),
        broken(lambda a: a[0]["meta_info"]["finish_reason"].__setitem__("type", "bored")),
    ],
    ids=lambda garbage: str(garbage)[:40],
)
def test_an_answer_that_cannot_be_a_sample_loses_the_engine(garbage: Any) -> None:
    with pytest.raises(EngineLost):
        read_answers(garbage, ["group.0", "group.1"])


def test_the_answers_as_recorded_are_samples() -> None:
    """Without this the test above could pass because everything is refused."""
    one, other = read_answers(answered(), ["group.0", "group.1"])
    assert (one.finish, one.version, len(one.tokens_T), len(other.logprobs_T)) == ("length", "0", 6, 6)


def test_an_aborted_answer_is_told_apart_from_a_cut_one_and_a_whole_one() -> None:
    made = answered()
    made[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "paused"}
    made[1]["meta_info"]["finish_reason"] = {"type": "stop", "matched": 2}
    assert [answer.finish for answer in read_answers(made, ["group.0", "group.1"])] == ["abort", "stop"]


def test_an_answer_that_two_versions_sampled_names_both() -> None:
    made = answered()
    made[0]["meta_info"]["weight_versions"] = [
        {"version": "0", "start": 0, "end": 2},
        {"version": "1", "start": 2, "end": 6},
    ]
    assert read_answers(made, ["group.0", "group.1"])[0].version == "0, 1"


def test_scores_and_checksums_that_cannot_be_lose_the_engine() -> None:
    scored = RECORDED["calls"]["scores"]["heard"][0]
    sequences = scored["body"]["input_ids"]
    assert len(read_scores(scored["answer"], sequences)) == sum(len(tokens) - 1 for tokens in sequences)
    for wrong in (None, scored["answer"][:1], [{}, {}], scored["answer"][::-1]):
        with pytest.raises(EngineLost):
            read_scores(wrong, sequences)
    for wrong in (None, {}, {"ranks": [{}]}):
        with pytest.raises(EngineLost):
            read_checksums(wrong)


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{", b"rubbish\r\n\r\n", None])
def test_no_complete_answer_is_unreachable(reply: bytes | None) -> None:
    """Closed at once, cut in the middle, no HTTP, nobody there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if reply is not None:
            listener.listen()

            def serve() -> None:
                connection, _ = listener.accept()
                connection.recv(1 << 16)
                connection.sendall(reply)
                connection.close()

            threading.Thread(target=serve, daemon=True).start()
        client = Client("127.0.0.1", port, "key")
        with pytest.raises(Unreachable):
            client.info()
        assert client.healthy(1) is False


def test_no_proxy_of_the_shell_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would see the key."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        heard: list[bytes] = []

        def serve() -> None:
            connection, _ = listener.accept()
            heard.append(connection.recv(1 << 16))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        assert Client("127.0.0.1", listener.getsockname()[1], "key").info() == {}
    assert heard[0].startswith(b"GET /server_info HTTP/1.1") and b"Bearer key" in heard[0]
