"""The embedded trainer: data-parallel ranks of the decoder with AdamW on float32 masters.

The optimiser batch is cut into `micro_batches` equal parts, whatever the number of ranks; their gradients are added
in the order of a binary tree over the parts. So the result is the same, bit for bit, with any number of ranks.
Every rank holds all weights and optimiser state: for models of laptop size. Left out: sharded state, mixed devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lpexp.config import rule
from lpexp.data import Batch, LearnReport, Param, SyncReport
from lpexp.errors import Mistake, RunError
from lpexp.trainer import TrainerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from lpexp.cluster import Future, Handle, Workers
    from lpexp.experiment import Experiment
    from lpexp.model.decoder import Routes, TrainWeights
    from lpexp.precision import Parts, Precision
    from lpexp.rollout import Rollout

MOST_PARAMS_CPU, MOST_PARAMS_GPU = 1_000_000_000, 8_000_000_000  # 16 bytes each: what a laptop, and one large GPU, hold
WEIGHTS, PREVIOUS, REFERENCE = "weights.safetensors", "previous.safetensors", "reference.safetensors"
ROUTING = ("flips", "margin", "replayed")  # LearnReport.routing
MASTER, OPTIMIZER, TRAINER = "master.safetensors", "optimizer.safetensors", "trainer.json"


class EmbeddedTrainerSpec(TrainerSpec):
    """`ranks` share the work and change no result; `micro_batches` fixes how gradients are summed."""

    arithmetic: ClassVar[str] = "lpexp"
    replays: ClassVar[bool] = True
    ranks: int = Field(ge=1)
    micro_batches: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"]
    lr: float = Field(ge=0)
    betas: tuple[float, float] = Field(strict=False)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_grad: float = Field(gt=0)  # L2 norm of the whole gradient
    lr_warmup_steps: int = Field(ge=0)

    @rule
    def _betas(self) -> Iterator[Mistake]:
        if not all(0 <= beta < 1 for beta in self.betas):
            yield Mistake(
                "betas", f"{list(self.betas)} are not both in [0, 1), where AdamW needs them; use [0.9, 0.95]"
            )

    @rule
    def _tree(self) -> Iterator[Mistake]:
        for key, value in (("micro_batches", self.micro_batches), ("ranks", self.ranks)):
            if value & (value - 1):
                below = 1 << value.bit_length() - 1
                why = "is not a power of two, which the order of gradient sums needs"
                yield Mistake(key, f"{value} {why}; use {below} or {2 * below}")
        if self.ranks > self.micro_batches:
            yield Mistake(
                "ranks",
                f"{self.ranks} ranks for micro_batches {self.micro_batches}: some would idle; "
                f"use at most {self.micro_batches} or raise trainer.micro_batches",
            )

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        samples = exp.task.prompts_per_step * exp.algorithm.samples_per_prompt
        batch = samples // exp.algorithm.updates_per_batch
        if batch * exp.algorithm.updates_per_batch == samples and batch % self.micro_batches:
            yield Mistake(
                "trainer.micro_batches",
                f"{self.micro_batches} does not divide the {batch} samples of an optimiser batch "
                f"(prompts x samples / updates); use {batch & -batch} or a smaller power of two",
            )
        params, gpus = exp.model.sized().num_params(), exp.cluster.gpus_per_node
        most = MOST_PARAMS_GPU if gpus else MOST_PARAMS_CPU
        if params > most:
            yield Mistake(
                "trainer",
                f"embedded: every rank holds all {params / 1e9:.3g}e9 parameters of {exp.model.name} and their "
                f"optimiser state; at most {most / 1e9:.3g}e9 are sensible here; type scale=laptop for its small twin",
            )

    def build(self, exp: Experiment, workers: Workers) -> EmbeddedTrainer:
        return EmbeddedTrainer(exp, self, workers)

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        count = 1 if exp.cluster.kind == "inline" else self.ranks
        return [
            {
                "role": "trainer rank",
                "count": count,
                "what": f"embedded decoder, {self.micro_batches} micro-batches in all, trains {exp.precision.name}",
            }
        ]


class EmbeddedRank:
    """One data-parallel rank. Runs in an actor or in this process."""

    def __init__(self, exp: Experiment, spec: EmbeddedTrainerSpec, rank: int, ranks: int, meet: str | None):
        import os

        import torch

        from lpexp.model.decoder import Decoder, pick_device, settle

        settle(exp.cluster.threads)
        self.exp, self.spec, self.rank, self.ranks = exp, spec, rank, ranks
        self.device = pick_device(spec.device, rank)
        self.model = exp.model.sized()
        self.params = list(self.model.params())
        self.wire = exp.fault.rollout(exp).wire  # in which weights are shipped
        self.trained = [p for p in self.params if p.kind != "router_bias"]
        self.decoder = Decoder(self.model, self.device)
        self.version = 0
        self.previous: dict[str, Tensor] | None = None  # the 16-bit weights one version back, kept when lag > 0
        self.reference: TrainWeights | None = None
        self._frozen: tuple[int, Any] | None = None
        self._sent: tuple[int, dict[str, Parts]] | None = None
        if meet is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            backend = "nccl" if self.device.type == "cuda" and torch.cuda.device_count() >= ranks else "gloo"
            torch.distributed.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=ranks)
            if self.device.type == "cpu":
                size = sum(math.prod(p.shape) for p in self.trained)
                board = torch.from_file(f"{meet}-gradients", shared=True, size=2 * ranks * size)
                self._boards = itertools.cycle(board.view(2, ranks, size))

    # -- start, save, restore ----------------------------------------------------------------------
    def warm_up(self) -> str | None:
        """Path of the warmed-up start weights (made, or found in the cache); None when the task has no warm-up."""
        if self.model.path or self.exp.task.warmup is None:
            return None
        from lpexp.warmup import warmed_up

        return str(warmed_up(self.exp))

    def begin(self, start: str | None) -> int:
        """Version 0: the warmed-up weights, the card's directory, or a random start; the KL reference is fixed here."""
        from lpexp.checkpoint import load_tensors
        from lpexp.model.decoder import initial_tensors

        if start is not None:
            self.start(load_tensors(Path(start)))
        elif self.model.path:
            from lpexp.model.hf import load_weights

            self.start(load_weights(Path(self.model.path), self.model))
        else:
            self.start(initial_tensors(self.model, self.exp.seed))
        if self.exp.uses_reference:
            self._refer(self.model_weights())
        return self.version

    def restore(self, directory: str) -> int:
        """Everything from a checkpoint; the version."""
        from lpexp.checkpoint import load_tensors

        at = Path(directory)
        self.start(load_tensors(at / MASTER))
        state = json.loads((at / TRAINER).read_text())
        for name, tensor in load_tensors(at / OPTIMIZER).items():
            getattr(self, name).copy_(tensor)
        self.version, self.updates = state["version"], state["updates"]
        if (at / PREVIOUS).exists():
            self.previous = {k: v.to(self.device) for k, v in load_tensors(at / PREVIOUS).items()}
        if (at / REFERENCE).exists():
            self._refer(load_tensors(at / REFERENCE))
        return self.version

    def start(self, tensors: dict[str, Tensor]) -> None:
        """Begin version 0 at these tensors: masters flat in one float32 buffer, moments zero."""
        import torch

        self.fixed = {p.name: tensors[p.name].float().to(self.device) for p in self.params if p.kind == "router_bias"}
        self.flat = torch.cat([tensors[p.name].float().reshape(-1) for p in self.trained]).to(self.device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.updates = self.version = 0
        self.previous = None
        self._renew()

    def _refer(self, tensors: dict[str, Tensor]) -> None:
        from lpexp.model.decoder import TrainWeights

        self.reference = TrainWeights(
            self.model, self.exp.reference.precision, {k: v.to(self.device) for k, v in tensors.items()}
        )

    def save(self, directory: str) -> None:
        """Masters, moments, the weights one version back and the reference, as safetensors; counters as JSON."""
        from lpexp.checkpoint import save_tensors

        at = Path(directory)
        save_tensors(at / MASTER, self.masters())
        save_tensors(at / OPTIMIZER, {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq})
        if self.previous is not None:
            save_tensors(at / PREVIOUS, self.previous)
        if self.reference is not None:
            save_tensors(at / REFERENCE, {k: v.detach() for k, v in self.reference.leaves.items()})
        (at / TRAINER).write_text(json.dumps({"version": self.version, "updates": self.updates}))

    def masters(self) -> dict[str, Tensor]:
        """float32 master weights by name (views)."""
        views, at = dict(self.fixed), 0
        for p in self.trained:
            size = int(np.prod(p.shape))
            views[p.name] = self.flat[at : at + size].view(p.shape)
            at += size
        return views

    def model_weights(self) -> dict[str, Tensor]:
        """The weights that the forward uses: masters rounded to the precision's weight dtype."""
        rounded = self.exp.precision.plain.round
        return {
            name: t.clone() if name in self.fixed else rounded(t.detach()).clone() for name, t in self.masters().items()
        }

    def _renew(self) -> None:
        from lpexp.model.decoder import TrainWeights

        self._sent = None
        self.weights = TrainWeights(self.model, self.exp.precision, self.model_weights(), grad=True)
        for name in self.fixed:
            self.weights.leaves[name].requires_grad_(False)

    # -- what it promises --------------------------------------------------------------------------
    def contract(self) -> dict[str, str]:
        """What this rank would publish, from its own copy of the config."""
        return self.exp.contract()

    def record(self, path: str, version: int) -> None:
        """Write the 16-bit weights of a version."""
        from lpexp.checkpoint import save_parts
        from lpexp.precision.wire import ship

        plain = ship(self._weights_of(version), self.params, self.exp.precision.plain, self.model.moe is not None)
        save_parts(Path(path), {param.name: parts for param, parts in plain}, {"version": str(version)})

    def _shipped(self, version: int) -> dict[str, Parts]:
        """The weights of a version (the newest, or the one before) in the wire's precision, made once.

        Where the trainer computes in that precision, its products read these very parts.
        """
        from lpexp.precision.wire import ship

        if self._sent is None or self._sent[0] != version:
            parts = ship(self._weights_of(version), self.params, self.wire, self.model.moe is not None)
            self._sent = (version, {param.name: made for param, made in parts})
            if version == self.version and self.wire == self.exp.precision:
                self.weights.adopt(self._sent[1])
        return self._sent[1]

    def _weights_of(self, version: int) -> dict[str, Tensor]:
        if version == self.version:
            return {name: leaf.detach() for name, leaf in self.weights.leaves.items()}
        if version == self.version - 1 and self.previous is not None:
            return self.previous
        raise RunError(f"version {version} is not at hand: the trainer is at {self.version}")

    def served(self, version: int) -> tuple[dict[str, Any], SyncReport]:
        """The weights of a version as they travel, and what that cost."""
        from lpexp.precision.wire import checksum, freeze

        begin = time.perf_counter()
        held = self._shipped(version)
        sent = checksum(held)
        frozen = {name: freeze(parts) for name, parts in held.items()}
        size = sum(raw.nbytes for parts in frozen.values() for _, _, raw in parts.values())
        seconds = {"quantize": time.perf_counter() - begin}
        return frozen, SyncReport(version, size, seconds, sent, (), self._quantized_share(), {})

    def _quantized_share(self) -> float:
        from lpexp.precision.wire import quantized_share

        return quantized_share(self.params, self.wire, self.model.moe is not None)

    def prepare(self, version: int, measure: bool) -> dict[str, dict[str, float]]:
        """Quantise ahead of the next step; with `measure`, also how far the served weights are from these."""
        held = self._shipped(version)
        if not measure:
            return {}
        moe, weights, stats = self.model.moe is not None, self._weights_of(version), QuantStats(self.wire)
        for param in self.params:
            if self.wire.covers(param, moe):
                stats.add(param, weights[param.name], held[param.name])
        return stats.result()

    # -- learning ----------------------------------------------------------------------------------
    def step(self, batch: Batch) -> dict[str, Any]:
        """This rank's share of a batch: `updates_per_batch` optimiser steps. Arrays come back for its own rows only."""
        import torch

        exp, algorithm = self.exp, self.exp.algorithm
        begin = time.perf_counter()
        shares = self._shares(len(batch))  # per update: the rows of each of this rank's micro-batches
        stale = bool((batch.versions_N < self.version).any())
        ahead = algorithm.updates_per_batch > 1 or stale
        found = Found(batch)
        if ahead:  # later updates and stale samples need the log-probabilities from before the first update
            with torch.no_grad():
                for start, stop in (rows for update in shares for rows in update):
                    part = batch.rows(start, stop)
                    lp_P, entropy = self._score(self.weights, part, None if stale else (found, start))
                    found.put("lp_P", start, lp_P)
                    found.put("entropy", start, entropy)
                    if stale:
                        lp_P, _ = self._score(self._sampled_by(part), part, (found, start))
                    found.put("lp_T", start, lp_P)
        recompute = time.perf_counter() - begin
        if exp.lag:
            self.previous = {name: leaf.detach().clone() for name, leaf in self.weights.leaves.items()}
        sums: dict[str, float] = {}
        norms, clipped, optimizer_s = [], 0, 0.0
        for u, update in enumerate(shares):
            rows = self._update_rows(len(batch), u)
            whole = batch.rows(*rows)
            num_tokens = int(whole.mask_NT.sum())
            grads = []
            for start, stop in update:
                part = batch.rows(start, stop)
                terms = self._backward(part, found, start, ahead, num_tokens, len(whole))
                grads.append(self._flat_grad())
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
            gradient = self._reduced(tree_sum(grads))
            mark = time.perf_counter()
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
            if not np.isfinite(norm):
                raise RunError(
                    f"step {batch.step}: the gradient norm is {norm}; lower trainer.lr or look at the batch in record/"
                )
            clipped += norm > self.spec.clip_grad
            norms.append(norm)
            lr = self._adam(gradient * min(1.0, self.spec.clip_grad / (norm + 1e-6)))
            self._renew()
            optimizer_s += time.perf_counter() - mark
        self.version += 1
        return {
            "found": found.mine(shares),
            "sums": sums,
            "grad_norm": float(np.mean(norms)),
            "grad_clip_frac": clipped / len(norms),
            "lr": lr,
            "param_norm": float(torch.linalg.vector_norm(self.flat, dtype=torch.float64)),
            "recompute": "forward" if ahead else "shared",
            "seconds": {"recompute": recompute, "optimizer": optimizer_s, "learn": time.perf_counter() - begin},
        }

    def _update_rows(self, size: int, update: int) -> tuple[int, int]:
        share = size // self.exp.algorithm.updates_per_batch
        return update * share, (update + 1) * share

    def _shares(self, size: int) -> list[list[tuple[int, int]]]:
        """For each update the (start, stop) rows of this rank's micro-batches."""
        shares = []
        for u in range(self.exp.algorithm.updates_per_batch):
            start, stop = self._update_rows(size, u)
            edges = np.linspace(start, stop, self.spec.micro_batches + 1).astype(int).tolist()
            mine = self.spec.micro_batches // self.ranks
            cuts = list(itertools.pairwise(edges))
            shares.append(cuts[self.rank * mine : (self.rank + 1) * mine])
        return shares

    def _sampled_by(self, part: Batch) -> TrainWeights:
        from lpexp.model.decoder import TrainWeights

        versions = np.unique(part.versions_N)
        if len(versions) != 1 or versions[0] not in (self.version, self.version - 1):
            raise RunError(
                f"step {part.step}: samples of versions {versions.tolist()} are refused, "
                f"the trainer is at {self.version}"
            )
        if versions[0] == self.version:
            return self.weights
        if self.previous is None:
            raise RunError(f"step {part.step}: the weights of version {versions[0]} are not at hand")
        if self._frozen is None or self._frozen[0] != versions[0]:
            self._frozen = (int(versions[0]), TrainWeights(self.model, self.exp.precision, self.previous))
        return self._frozen[1]

    def _score(
        self, weights: TrainWeights, part: Batch, routing: tuple[Found, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each response token: two float32 vectors over part.mask_NT's tokens.

        `routing` says where to note how the routers chose beside the rollout's (and from which row on).
        """
        import torch

        from lpexp.model.decoder import Routes, token_logprobs

        view, routes = Shared(part), None
        prompts, answers, owner, lengths, before, tokens = (torch.from_numpy(a).to(self.device) for a in view.arrays)
        replay = self.spec.routing_replay and weights is not self.reference
        if replay and part.experts is None:
            raise RunError(f"step {part.step}: trainer.routing_replay is on, but the rollout returned no experts")
        if part.experts is not None and (replay or routing):
            recorded = torch.from_numpy(view.experts(part.experts)).to(self.device)
            routes = Routes(recorded if replay else None, margins=routing is not None)
        hidden = self.decoder.continued(weights, prompts, answers, owner, lengths, routes)
        if routing and routes:
            self._note_routing(*routing, routes, recorded[before], before)
        logits = self.decoder.head(weights, hidden[before])  # of the token before each response token
        return token_logprobs(logits, tokens, self.exp.rollout.temperature)

    def _note_routing(self, found: Found, start: int, routes: Routes, recorded: Tensor, before: Tensor) -> None:
        """Of each response token: layers that choose other experts than the rollout, least margin, layers replayed."""
        import torch

        own = torch.stack(routes.chosen, 1)[before]  # [tokens, layers, top_k]
        found.put("flips", start, (own.sort(-1).values != recorded.sort(-1).values).any(-1).sum(-1))
        margins = torch.stack(routes.margin, 1)[before] if routes.margin else own.new_zeros(own.shape[:2])
        found.put("margin", start, margins.amin(-1))
        known = (recorded >= 0).all(-1).sum(-1)
        found.put("replayed", start, known if routes.given is not None else torch.zeros_like(known))

    def _backward(
        self, part: Batch, found: Found, start: int, ahead: bool, num_tokens: int, num_samples: int
    ) -> dict[str, float]:
        """One micro-batch: forward, loss, gradients into the leaves; the loss terms."""
        import torch

        lp_flat, entropy = self._score(self.weights, part, None if ahead else (found, start))
        mask = torch.from_numpy(part.mask_NT).to(self.device)
        if not ahead:
            for name in ("lp_T", "lp_P"):
                found.put(name, start, lp_flat.detach())
            found.put("entropy", start, entropy)
        found.put("lp_C", start, lp_flat.detach())
        lp_C = torch.zeros(mask.shape, device=self.device).masked_scatter(mask, lp_flat)
        lp_old = found.get("lp_P", part, start, self.device)
        lp_ref = None
        if self.reference is not None:
            with torch.no_grad():
                found.put("lp_ref", start, self._score(self.reference, part)[0])
            lp_ref = found.get("lp_ref", part, start, self.device)
        lp_R = torch.from_numpy(part.logprobs_rollout_NT).to(self.device)
        weights = self.exp.correction.weights(lp_old, lp_R, mask)
        found.put("weights", start, weights[mask])
        advantages = torch.from_numpy(part.advantages_N).to(self.device)
        loss, terms = self.exp.algorithm.loss(
            lp_C, lp_old, lp_ref, advantages, weights, mask, num_tokens, num_samples, self.exp.task.max_response
        )
        loss.backward()
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in terms.items()}}

    def _flat_grad(self) -> Tensor:
        """The leaves' gradients as one flat float32 vector; the leaves are cleared."""
        import torch

        pieces = []
        for p in self.trained:
            leaf = self.weights.leaves[p.name]
            pieces.append(
                torch.zeros(p.shape, device=self.device).reshape(-1) if leaf.grad is None else leaf.grad.reshape(-1)
            )
            leaf.grad = None
        return torch.cat(pieces)

    def _reduced(self, gradient: Tensor) -> Tensor:
        """The ranks' gradients added in tree order: the same bits as one rank that saw every micro-batch.

        CPU ranks share one machine and leave their gradients in memory that all of them see, which takes a tenth of
        the time of sockets. The two boards alternate: whoever passes the next barrier has read the one before it.
        """
        import torch

        if self.ranks == 1:
            return gradient
        if self.device.type == "cpu":
            board = next(self._boards)
            board[self.rank].copy_(gradient)
            torch.distributed.barrier()
            return tree_sum(list(board))
        parts = [torch.empty_like(gradient) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, gradient)
        return tree_sum(parts)

    def _adam(self, gradient: Tensor) -> float:
        """One AdamW step on the flat masters (torch's own single-tensor rule); the learning rate used."""
        import torch
        from torch.optim._functional import adamw

        self.updates += 1
        spec = self.spec
        lr = spec.lr * min(1.0, self.updates / spec.lr_warmup_steps) if spec.lr_warmup_steps else spec.lr
        steps = torch.tensor(float(self.updates - 1))  # the rule counts it up by one
        adamw(
            [self.flat], [gradient], [self.exp_avg], [self.exp_avg_sq], [], [steps],
            fused=True, foreach=False, amsgrad=False, beta1=spec.betas[0], beta2=spec.betas[1], lr=lr,
            weight_decay=spec.weight_decay, eps=spec.eps, maximize=False,
        )  # fmt: skip
        return lr


class Shared:
    """A batch seen as prompts and answers: each prompt once, however many samples it has."""

    def __init__(self, part: Batch):
        prompts, first, owner = np.unique(part.prompt_ids_N, return_index=True, return_inverse=True)
        lengths = part.prompt_lengths_N.astype(np.int64)
        sizes = part.lengths_N - lengths  # response tokens; the last one is predicted, never read
        width, longest = max(int(sizes.max()) - 1, 1), int(lengths.max())
        tokens = part.tokens_NT.astype(np.int64)
        places = np.minimum(lengths[:, None] + np.arange(width), tokens.shape[1] - 1)
        answers = np.take_along_axis(tokens, places, 1)
        asked = np.where(np.arange(longest) < lengths[first, None], tokens[first, :longest], 0)
        # The row that predicts response token j of sample n: the prompt's last, then the answer's j - 1.
        n, j = np.nonzero(np.arange(int(sizes.max())) < sizes[:, None])
        at_prompt = owner[n] * longest + lengths[n] - 1
        at_answer = len(prompts) * longest + n * width + j - 1
        before = np.where(j == 0, at_prompt, at_answer)
        self.arrays = (asked, answers, owner, lengths, before, tokens[n, lengths[n] + j])
        self._first, self._lengths, self._sizes, self._longest, self._width = first, lengths, sizes, longest, width

    def experts(self, experts: np.ndarray) -> np.ndarray:
        """The rollout's choices [n, T - 1, layers, top_k] for each row of prompts, then of answers; -1: padding."""
        asked, j = experts[self._first, : self._longest], np.arange(self._width)
        inside = np.arange(self._longest) < self._lengths[self._first, None]
        places = np.minimum(self._lengths[:, None] + j, experts.shape[1] - 1)
        answered = np.take_along_axis(experts, places[..., None, None], 1)
        read = j < self._sizes[:, None] - 1
        parts = ((asked, inside), (answered, read))
        rows = [np.where(keep[..., None, None], part, -1).reshape(-1, *experts.shape[2:]) for part, keep in parts]
        return np.concatenate(rows).astype(np.int64)


class Found:
    """Per-token findings of one step as [N, T] float32 arrays; each rank fills its own rows."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, name: str, start: int, tokens: Tensor) -> None:
        """Values of consecutive response tokens, beginning with those of row `start`."""
        array = self.arrays.setdefault(name, np.zeros(self.batch.tokens_NT.shape, np.float32))
        flat = tokens.detach().cpu().numpy()
        ends = self.batch.mask_NT[start:].sum(1).cumsum()
        stop = start + int(np.searchsorted(ends, len(flat))) + 1 if len(flat) else start
        rows = array[start:stop]
        rows[self.batch.mask_NT[start:stop]] = flat

    def get(self, name: str, part: Batch, start: int, device: Any) -> Tensor:
        import torch

        return torch.from_numpy(self.arrays[name][start : start + len(part)]).to(device)

    def mine(self, shares: list[list[tuple[int, int]]]) -> list[tuple[int, int, dict[str, np.ndarray]]]:
        """(start, stop, arrays of these rows) of every micro-batch of this rank."""
        return [
            (start, stop, {name: array[start:stop] for name, array in self.arrays.items()})
            for update in shares
            for start, stop in update
        ]


class QuantStats:
    """quant/<class>/*: how far the served weights are from the trainer's, over all tensors of a module class."""

    def __init__(self, wire: Precision):
        self.wire = wire
        self.classes: dict[str, list[tuple[int, float, dict[str, float]]]] = {}

    def add(self, param: Param, weight: Tensor, parts: Parts) -> None:
        found = (weight.numel(), float(weight.double().square().sum()), self.wire.stats(weight, parts))
        self.classes.setdefault(param.kind, []).append(found)

    def result(self) -> dict[str, dict[str, float]]:
        """Per class; what the precision does not tell of its codes or scales is absent."""
        merged = {}
        for kind, found in self.classes.items():
            sizes, told = [n for n, _, _ in found], [stats for _, _, stats in found]
            lost = sum(square * stats["rel_error"] ** 2 for _, square, stats in found)
            rel_error = (lost / sum(square for _, square, _ in found)) ** 0.5
            merged[kind] = {
                "rel_error": rel_error,
                "sqnr_db": -20 * float(np.log10(rel_error)) if rel_error else float("inf"),
            }
            for key in ("saturated_frac", "zero_block_frac"):
                if key in told[0]:
                    shares = zip(sizes, told, strict=True)
                    merged[kind][key] = sum(n * stats[key] for n, stats in shares) / sum(sizes)
            for key, extreme in (("scale_min", min), ("scale_max", max)):
                if key in told[0]:
                    merged[kind][key] = extreme(stats[key] for stats in told)
        return merged


def tree_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum in the order of a binary tree; the length is a power of two."""
    if len(tensors) == 1:
        return tensors[0]
    half = len(tensors) // 2
    return tree_sum(tensors[:half]) + tree_sum(tensors[half:])


class EmbeddedTrainer:
    """The group of ranks as the loop sees it."""

    def __init__(self, exp: Experiment, spec: EmbeddedTrainerSpec, workers: Workers):
        self.exp, self.spec, self.workers = exp, spec, workers
        inline = exp.cluster.kind == "inline"
        count = 1 if inline else spec.ranks  # the result is the same
        meet = None
        if count > 1:
            meet = str(workers.scratch / "trainer-rendezvous")
        self.ranks: list[Handle] = [
            workers.spawn(f"trainer-{r}", EmbeddedRank, exp, spec, r, count, meet, env=spec.environment(exp))
            for r in range(count)
        ]
        self.version = 0

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self.answers(method, [rank.call(method, *args) for rank in self.ranks])

    def answers(self, method: str, futures: Sequence[Future]) -> list[Any]:
        """What all ranks answer; RunError that says how to go on when one has died."""
        for rank, future in zip(self.ranks, futures, strict=True):
            if future.died():
                raise RunError(
                    f"{rank.name} died during {method}: {future.error()}; "
                    f"continue with: resume=auto output_dir={self.workers.run_dir}"
                )
        return [future.result() for future in futures]

    def contract(self) -> dict[str, str]:
        return self._all("contract")[0]

    def restore(self, directory: Path | None) -> None:
        if directory is not None:
            self.version = self._all("restore", str(directory))[0]
            return
        start = self.ranks[0].call("warm_up").result()
        self.version = self._all("begin", start)[0]

    def step(self, batch: Batch) -> EmbeddedLearning:
        learning = EmbeddedLearning(self, batch)
        self.version += 1
        return learning

    def publish(self, rollout: Rollout, version: int) -> EmbeddedPublishing:
        return EmbeddedPublishing(self, rollout, version)

    def record(self, path: Path, version: int) -> Future:
        return self.ranks[0].call("record", str(path), version)

    def save(self, directory: Path) -> None:
        self.ranks[0].call("save", str(directory)).result()

    def close(self) -> None:
        for rank in self.ranks:
            rank.stop()


class EmbeddedLearning:
    """One batch, each rank at its share."""

    def __init__(self, trainer: EmbeddedTrainer, batch: Batch):
        self.trainer, self.batch, self.version = trainer, batch, trainer.version
        self.begin = time.perf_counter()
        self.futures = [rank.call("step", batch) for rank in trainer.ranks]
        if trainer.exp.cluster.kind == "inline":
            trainer.answers("step", self.futures)  # it has been made: what broke it is told before more is asked

    def result(self) -> LearnReport:
        batch, trainer = self.batch, self.trainer
        answers = trainer.answers("step", self.futures)
        arrays: dict[str, np.ndarray] = {}
        for answer in answers:
            for start, stop, found in answer["found"]:
                for name, rows in found.items():
                    arrays.setdefault(name, np.zeros(batch.tokens_NT.shape, np.float32))[start:stop] = rows
        first = answers[0]
        sums = {name: sum(answer["sums"].get(name, 0.0) for answer in answers) for name in sorted(first["sums"])}
        updates = trainer.exp.algorithm.updates_per_batch
        scalars = {f"train/{name}": value / updates for name, value in sums.items()}
        scalars |= {f"train/{name}": first[name] for name in ("grad_norm", "grad_clip_frac", "lr", "param_norm")}
        seconds = {name: max(a["seconds"][name] for a in answers) for name in ("recompute", "optimizer")}
        return LearnReport(
            batch=batch,
            lp_T=arrays["lp_T"],
            lp_P=arrays["lp_P"],
            lp_C=arrays["lp_C"],
            entropy=arrays["entropy"],
            weights=arrays["weights"],
            lp_ref=arrays.get("lp_ref"),
            routing=np.stack([arrays[name] for name in ROUTING]) if ROUTING[0] in arrays else None,
            version=self.version,
            scalars=scalars,
            seconds=seconds | {"learn": time.perf_counter() - self.begin - seconds["recompute"]},
            recompute=first["recompute"],
        )


class EmbeddedPublishing:
    """One version's way to the engines: the first rank ships, the last one measures, the engines load."""

    def __init__(self, trainer: EmbeddedTrainer, rollout: Rollout, version: int):
        begin, ranks = time.perf_counter(), trainer.ranks
        self.version = version
        shards, self.sent = trainer.workers.share(ranks[0], "served", version)
        last = len(ranks) - 1
        self.others = [r.call("prepare", version, i == last) for i, r in enumerate(ranks) if i or not last]
        self.loading = rollout.load(shards, version)
        self.asking = time.perf_counter() - begin  # in one process that is all of it

    def result(self) -> SyncReport:
        begin = time.perf_counter()
        held, seconds = self.loading.result()
        report, quant = self.sent.result(), [other.result() for other in self.others][-1]
        whole = self.asking + time.perf_counter() - begin
        wrong = [index for index, checksum in enumerate(held) if checksum != report.checksum_sent]
        if wrong:
            raise RunError(
                f"weights of version {self.version}: engine {wrong[0]} holds {held[wrong[0]]}, "
                f"not {report.checksum_sent}"
            )
        spent = report.seconds | seconds
        spent["transfer"] = max(whole - sum(spent.values()), 0.0)
        return dataclasses.replace(report, seconds=spent | {"sync": whole}, checksums_held=tuple(held), quant=quant)
