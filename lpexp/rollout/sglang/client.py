"""What lpexp says to an SGLang server over HTTP, and what it makes of the answers. One connection a call, no proxy.

Tried with SGLang 0.5.23; its answers, recorded, are in tests/rollout/sglang/recorded.json. Left out: streaming, text.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lpexp.errors import EngineLost, RunError
from lpexp.rollout import Sampling

QUICK_S = 60  # a call that moves no weights and generates nothing


class Unreachable(Exception):
    """No complete answer came: refused, reset, or not within the time."""


class Refused(RunError):
    """The server answers that it will not, or that it failed."""


class Answer(NamedTuple):
    """One generated answer."""

    tokens_T: np.ndarray  # int32
    logprobs_T: np.ndarray  # float32, of the softmax at the sampling temperature, before top-p and top-k cut it
    finish: str  # "stop" | "length" | "abort"
    version: str


class Client:
    """One server. Methods raise Unreachable, or Refused. `answered`: when it last gave a sign of life."""

    def __init__(self, host: str, port: int, key: str):
        self.host, self.port, self._key = host, port, key
        self.answered = time.monotonic()

    # -- generation ------------------------------------------------------------------------------------------------
    def generate(
        self,
        tokens: Sequence[int],
        names: Sequence[str],
        sampling: Sampling,
        longest: int,
        stop_id: int,
        timeout_s: float,
    ) -> list[Answer]:
        """One answer a name to these prompt tokens; names are the server's, unique while a request lives.

        Every field that a model's own generation settings could decide is said. Temperature 0 is greedy, and its
        log-probabilities are those of temperature 1, on this side and on the trainer's.
        """
        how = {
            "max_new_tokens": longest,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [stop_id],
        }
        asked = {
            "input_ids": [list(tokens) for _ in names],
            "rid": list(names),
            "sampling_params": how,
            "return_logprob": True,
        }
        return read_answers(self._post("/generate", asked, timeout_s), names)

    def score(self, sequences: Sequence[Sequence[int]], timeout_s: float = QUICK_S) -> np.ndarray:
        """Log-probability, at temperature 1, of every token but the first of each sequence, one after the other."""
        asked = {
            "input_ids": [list(tokens) for tokens in sequences],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return read_scores(self._post("/generate", asked, timeout_s), sequences)

    def abort(self, names: Sequence[str]) -> None:
        """Whatever these requests would still have answered is dropped."""
        for name in names:
            self._call("POST", "/abort_request", {"rid": name}, QUICK_S)

    # -- state -----------------------------------------------------------------------------------------------------
    def healthy(self, timeout_s: float) -> bool:
        """Has every process of the server moved a token, or will it within the time? Needs no key."""
        try:
            return self._exchange("GET", "/health_generate", None, timeout_s)[0] == 200
        except Unreachable:
            return False

    def info(self) -> dict[str, Any]:
        """What the server resolved its configuration to; it holds the key."""
        return self._call("GET", "/server_info", None, QUICK_S)

    def checksums(self, timeout_s: float) -> list[dict[str, str]]:
        """{parameter: hash of what is held}, one a rank of the server in order."""
        return read_checksums(self._post("/weights_checker", {"action": "checksum", "selector": "target"}, timeout_s))

    def pause(self) -> None:
        """Stop generating; nothing may be owed."""
        self._post("/pause_generation", {"mode": "abort"}, QUICK_S)

    def proceed(self) -> None:
        self._post("/continue_generation", {}, QUICK_S)

    def flush(self) -> None:
        """Forget every key and value that older weights made."""
        self._call("POST", "/flush_cache", None, QUICK_S, plain=True)

    def release(self, tags: Sequence[str]) -> None:
        """Give GPU memory back: "kv_cache", "weights", "cuda_graph". Weights are lost, and must be loaded again."""
        self._post("/release_memory_occupation", {"tags": list(tags)}, QUICK_S)

    def occupy(self, tags: Sequence[str]) -> None:
        self._post("/resume_memory_occupation", {"tags": list(tags)}, QUICK_S)

    # -- weights ---------------------------------------------------------------------------------------------------
    def begin(self, timeout_s: float) -> None:
        """Open an update: weights that are packed for the kernels become loadable again."""
        self._post("/begin_weight_update", {}, timeout_s)

    def end(self, timeout_s: float) -> None:
        """Close the update: what kernels need is packed again."""
        self._post("/end_weight_update", {}, timeout_s)

    def load_directory(self, directory: str, version: int, timeout_s: float) -> None:
        asked = {"model_path": directory, "load_format": "auto", "weight_version": str(version)}
        self._post("/update_weights_from_disk", asked, timeout_s)

    def load_tensors(self, ranks: Sequence[bytes], version: int | None, timeout_s: float) -> None:
        """One pickled [(name, tensor), ...] for each rank of the server; `version`: this was the last bucket."""
        coded = [base64.b64encode(payload).decode() for payload in ranks]
        self._post("/update_weights_from_tensor", {"serialized_named_tensors": coded, **_last(version)}, timeout_s)

    def join(self, group: dict[str, Any], timeout_s: float) -> None:
        """Become part of a process group; returns when all of it is there."""
        self._post("/init_weights_update_group", group, timeout_s)

    def leave(self, name: str) -> None:
        self._post("/destroy_weights_update_group", {"group_name": name}, QUICK_S)

    def receive(
        self, group: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]], version: int | None, timeout_s: float
    ) -> None:
        """Take (name, dtype, shape) of a bucket from the group's first rank, which sends them in this order."""
        names, dtypes, shapes = (list(column) for column in zip(*tensors, strict=True))
        asked = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group, **_last(version)}
        self._post("/update_weights_from_distributed", asked, timeout_s)

    # -- the wire --------------------------------------------------------------------------------------------------
    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        return self._call("POST", path, body, timeout_s)

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, plain: bool = False) -> Any:
        """The JSON that a call answers, or None where it answers nothing; Refused with what the server said."""
        status, raw = self._exchange(method, path, body, timeout_s)
        if status != 200:
            raise Refused(f"SGLang answers {path} with {status}: {_said(raw)}")
        if plain or not raw.strip():
            return None
        try:
            answer = json.loads(raw)
        except ValueError:
            raise EngineLost(f"{path} was answered with what is no JSON: {_said(raw)}") from None
        if isinstance(answer, dict) and answer.get("success") is False:
            raise Refused(f"SGLang answers {path}: {answer.get('message')}")
        return answer

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            raw = response.read()
            if response.status == 200:  # a server whose scheduler hangs goes on refusing
                self.answered = time.monotonic()
            return response.status, raw
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{path}: {type(error).__name__} {error}".rstrip()) from None
        finally:
            connection.close()


def _last(version: int | None) -> dict[str, Any]:
    """Only the last bucket changes the version and flushes, so that no answer can name a half of an update."""
    return {"flush_cache": False} if version is None else {"flush_cache": True, "weight_version": str(version)}


def _said(raw: bytes) -> str:
    return " ".join(raw.decode(errors="replace").split())[:500] or "nothing"


# -- what the answers mean; EngineLost for garbage ---------------------------------------------------------------------


def read_answers(answered: Any, names: Sequence[str]) -> list[Answer]:
    """The answers of /generate, in the order in which they were asked for."""
    try:
        if [one["meta_info"]["id"] for one in answered] != list(names):
            raise EngineLost(f"{len(names)} answers were asked for, these came: {str(answered)[:300]}")
        return [_answer(one) for one in answered]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EngineLost(f"an answer cannot be read ({type(error).__name__} {error}): {str(answered)[:300]}") from None


def _answer(one: dict[str, Any]) -> Answer:
    meta, tokens = one["meta_info"], np.array(one["output_ids"], np.int32)
    finish, versions = meta["finish_reason"]["type"], {span["version"] for span in meta["weight_versions"]}
    told = meta.get("output_token_logprobs") or []
    logprobs = np.array([entry[0] for entry in told], np.float32)
    if finish not in ("stop", "length", "abort"):
        raise EngineLost(f"an answer ended for an unknown reason: {meta['finish_reason']}")
    if finish != "abort":
        if [entry[1] for entry in told] != tokens.tolist() or not len(tokens):
            raise EngineLost(f"tokens {tokens.tolist()[:20]} came with log-probabilities of {str(told)[:200]}")
        if not (np.isfinite(logprobs).all() and (logprobs < 1e-3).all()):
            raise EngineLost(f"log-probabilities that are none: {logprobs[:20].tolist()}")
    return Answer(tokens, logprobs, finish, ", ".join(sorted(versions)))


def read_scores(answered: Any, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-probabilities of the prompts' tokens, the first of each left out."""
    found: list[float] = []
    try:
        for one, tokens in zip(answered, sequences, strict=True):
            told = one["meta_info"]["input_token_logprobs"]
            if [entry[1] for entry in told] != list(tokens):
                raise EngineLost(f"tokens {list(tokens)[:20]} were scored as {str(told)[:200]}")
            found += [entry[0] for entry in told[1:]]
        scores = np.array(found, np.float32)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EngineLost(f"scores cannot be read ({type(error).__name__} {error}): {str(answered)[:300]}") from None
    if not np.isfinite(scores).all():
        raise EngineLost(f"log-probabilities of the canary that are none: {scores[:20].tolist()}")
    return scores


def read_checksums(answered: Any) -> list[dict[str, str]]:
    try:
        ranks = sorted(answered["ranks"], key=lambda rank: rank["parallelism_info"][0]["rank"])
        return [dict(rank["checksums"]) for rank in ranks]
    except (KeyError, TypeError, IndexError) as error:
        raise EngineLost(f"checksums cannot be read ({type(error).__name__} {error}): {str(answered)[:300]}") from None
