"""What travels through the loop: Prompt -> Group of Samples -> Batch. All frozen, all plain numpy.

Axes: N samples of a batch (P prompts x G samples, group-major), T token position (prompt, then response, right-padded).
No torch here: the driver and the judge of configs import this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Param(NamedTuple):
    """One tensor of a model under its Hugging Face name, e.g. ("model.norm.weight", (128,), "norm").

    `kind` is one of: embed head norm bias router router_bias attn_qkv attn_out mlp_up mlp_down shared_up
    shared_down expert_up expert_down. A matrix is [out, in], as in the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Prompt:
    """One question. `id` is unique within a run: step * prompts + index for training, 2**31 + index held out.

    Example: Prompt(id=3, tokens=(18, 27, 3, 62), text="rc>", answer="cr")
    """

    id: int
    tokens: tuple[int, ...]
    text: str
    answer: str
    source: int | None = None  # where the task finds the question again, if it needs more than the answer to score


@dataclass(frozen=True)
class Sample:
    """One answer to a prompt, as the rollout engine emitted it."""

    prompt_id: int
    index: int  # g: which of the prompt's samples
    tokens_T: np.ndarray  # int32 [response]: what was generated, the stop token included
    logprobs_T: np.ndarray  # float32 [response]: lp_R, at the sampling temperature, before any top-p or top-k cut
    version: int  # of the weights that sampled it
    finish: str  # "stop" | "length" | "abort"
    experts: np.ndarray | None = None  # int16 [prompt + response - 1, moe layers, top_k]: the router's choices

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its short arrays as bytes, in a third of the time."""
        arrays = (np.asarray(self.tokens_T, np.int32).tobytes(), np.asarray(self.logprobs_T, np.float32).tobytes())
        return _sample, (self.prompt_id, self.index, *arrays, self.version, self.finish, self.experts)


def _sample(prompt_id: int, index: int, tokens: bytes, logprobs: bytes, *rest: Any) -> Sample:
    return Sample(prompt_id, index, np.frombuffer(tokens, np.int32), np.frombuffer(logprobs, np.float32), *rest)


@dataclass(frozen=True)
class Group:
    """All samples of one prompt; rewards are filled in by `Task.score`."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    rewards_G: np.ndarray | None = None  # float64 [G]
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # reward component -> float64 [G]
    errors: int = 0  # rewards that raised or timed out
    texts: tuple[str, ...] = ()  # decoded answers, one a sample


@dataclass(frozen=True)
class Batch:
    """One step's samples as rectangles. The trainer reads nothing else."""

    step: int
    tokens_NT: np.ndarray  # int32 [N, T], padded with 0
    mask_NT: np.ndarray  # bool [N, T], True on response tokens: what the loss sees
    logprobs_rollout_NT: np.ndarray  # float32 [N, T], lp_R at response tokens, 0 elsewhere
    advantages_N: np.ndarray  # float32 [N]
    rewards_N: np.ndarray  # float64 [N]
    lengths_N: np.ndarray  # int32 [N]: prompt + response
    prompt_lengths_N: np.ndarray  # int32 [N]
    versions_N: np.ndarray  # int32 [N]: weight version that sampled
    prompt_ids_N: np.ndarray  # int64 [N]
    sample_index_N: np.ndarray  # int32 [N]
    group_size: int  # G
    experts: np.ndarray | None = None  # int16 [N, T-1, moe layers, top_k], -1 on padding

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop as a Batch of the same T (views, no copy)."""
        cut = {name: value[start:stop] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return Batch(**{**vars(self), **cut})


@dataclass(frozen=True)
class LearnReport:
    """What one trainer step found, before metrics are computed from it. Arrays are [N, T], valid where `mask_NT`.

    `scalars` holds metric keys that are numbers already (train/loss, ...); `seconds` the time/* parts spent here.
    """

    batch: Batch
    lp_T: np.ndarray  # float32: trainer log-probs under the weights that sampled
    lp_P: np.ndarray  # float32: under the newest weights before the first optimiser step; is lp_T when lag = 0
    lp_C: np.ndarray  # float32: in the last gradient forward that saw the sample
    entropy: np.ndarray  # float32: full-vocabulary entropy under lp_P's weights, at the sampling temperature
    weights: np.ndarray  # float32: correction weight w' (0 = removed)
    lp_ref: np.ndarray | None  # float32: the KL reference's, or None
    version: int  # newest weight version before the step
    scalars: dict[str, float]
    seconds: dict[str, float]
    recompute: str  # "shared": lp_T is the training forward; "forward": an extra forward was made
    routing: np.ndarray | None = None  # [3, N, T] under lp_T: layers that choose other experts, least margin, replayed


@dataclass(frozen=True)
class SyncReport:
    """What one weight update moved: becomes the sync/* and quant/* metrics."""

    version: int
    bytes: int
    seconds: dict[str, float]  # quantize, transfer, load; sync is their sum and the rest
    checksum_sent: str
    checksums_held: tuple[str, ...]  # one an engine, recomputed from what it serves
    quantized_param_frac: float
    quant: dict[str, dict[str, float]]  # module class -> rel_error, sqnr_db, saturated_frac, ...


Metrics = dict[str, Any]
