"""One rank of the Megatron-core trainer: its stage and shard of the model, its share of every batch.

Rows of an optimiser batch are dealt out to the data-parallel ranks in order, each share is cut into micro-batches of
at most `max_tokens_per_gpu` padded tokens, and megatron-core's schedule runs them. Gradients, clipping, AdamW with its
state spread over the data-parallel ranks, and checkpoints are the library's own.
Left out: packed sequences and context parallelism on the local layer spec (refused when the config is judged).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lpexp.data import Batch, Param, SyncReport
from lpexp.errors import RunError
from lpexp.model.decoder import initial_tensors, settle
from lpexp.precision import Parts, Precision, side
from lpexp.trainer.megatron import MegatronTrainerSpec, cpu, network
from lpexp.trainer.megatron.layers import Arithmetic, Linear
from lpexp.trainer.megatron.names import Piece
from lpexp.trainer.step import Found, QuantStats, policy_loss

cpu.imported()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.precision.wire import Frozen

STATE, TRAINER = "torch_dist", "trainer.json"
Rows = tuple[int, int]  # first and last + 1
Scored = tuple[Tensor, Tensor]  # log-probability and entropy of each response token


class MegatronRank:
    """Runs in an actor, or, when it is the only one, in this process."""

    def __init__(self, exp: Experiment, rank: int, ranks: int, meet: str):
        assert isinstance(exp.trainer, MegatronTrainerSpec)
        settle(exp.cluster.threads)
        self.exp, self.spec, self.rank, self.ranks = exp, exp.trainer, rank, ranks
        self.model = exp.model.sized()
        self.params = list(self.model.params())
        self.moe = self.model.moe is not None
        self.version = self.updates = 0
        self.previous: dict[str, Tensor] | None = None  # the 16-bit weights one version back, kept when lag > 0
        self.reference: dict[str, Tensor] | None = None
        self._held: dict[str, dict[str, Frozen]] = {}
        self._join(meet)
        with cpu.here():
            self._build()
        self._meet_owners()

    # -- set up ------------------------------------------------------------------------------------
    def _join(self, meet: str) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "gloo" if cpu.needed() else "nccl"
        if not cpu.needed():
            torch.cuda.set_device(self.rank % torch.cuda.device_count())
        torch.distributed.init_process_group(
            backend, init_method=f"file://{meet}", rank=self.rank, world_size=self.ranks
        )
        spec = self.spec
        with cpu.here():
            parallel_state.initialize_model_parallel(
                spec.tp,
                spec.pp,
                context_parallel_size=spec.cp,
                expert_model_parallel_size=spec.ep,
                expert_tensor_parallel_size=spec.etp,
                create_gloo_process_groups=False,
            )
            tensor_parallel.model_parallel_cuda_manual_seed(self.exp.seed)
        self.data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        self.tells = self.last_stage and parallel_state.get_tensor_model_parallel_rank() == 0

    def _build(self) -> None:
        spec = self.spec
        self.arithmetic = Arithmetic(self.model, self.exp.precision)
        self.network, self.table = network.build(self.model, spec, self.arithmetic)
        self.ddp = DistributedDataParallel(
            self.network.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            self.network,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=spec.lr,
                weight_decay=spec.weight_decay,
                adam_beta1=spec.betas[0],
                adam_beta2=spec.betas[1],
                adam_eps=spec.eps,
                clip_grad=spec.clip_grad,
                use_distributed_optimizer=True,
                optimizer_cpu_offload=spec.optimizer_offload,
                params_dtype=self.network.config.params_dtype,
            ),
            [self.ddp],
            use_gloo_process_groups=False,
        )
        # Every tensor that a checkpoint holds, under its name here: parameters, and the routers' selection biases.
        buffers = ((name, t) for name, t in self.network.named_buffers() if name.endswith("expert_bias"))
        self.tensors: dict[str, Tensor] = dict(itertools.chain(self.network.named_parameters(), buffers))
        self.pieces = {name: self.table.pieces(name) for name in self.tensors}

    def _meet_owners(self) -> None:
        """Of every part of the model, the first rank that holds it: that one gives it away."""
        held: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(held, self.pieces)
        self.owners: dict[str, list[tuple[int, str, Piece]]] = {param.name: [] for param in self.params}
        seen = set()
        for rank, pieces in enumerate(held):
            for local, own in pieces.items():
                for piece in own:
                    part = piece.name, piece.rows, piece.cols
                    if part not in seen:
                        seen.add(part)
                        self.owners[piece.name].append((rank, local, piece))
        for param in self.params:
            found = sum(_size(piece, param) for _, _, piece in self.owners[param.name])
            assert found == math.prod(param.shape), f"{param.name}: {found} of {math.prod(param.shape)} elements"
        self.buckets: list[list[Param]] = []
        room = 0
        for param in self.params:
            size = 2 * math.prod(param.shape)
            if size > room:
                self.buckets.append([])
                room = self.spec.bucket_mb << 20
            self.buckets[-1].append(param)
            room -= size

    def shutdown(self) -> None:
        """Leave the process as it was, for the next one that trains in it."""
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()

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

        if start is not None:
            self.load(load_tensors(Path(start)).items())
        elif self.model.path:
            self.load(self._read(Path(self.model.path)))
        else:
            self.load(initial_tensors(self.model, self.exp.seed).items())
        if self.exp.uses_reference:
            self.reference = self._rounded()
        return self.version

    def _read(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """Those tensors of a directory that this rank holds a part of, one at a time."""
        from lpexp.model.hf import read_weights

        own = {piece.name for pieces in self.pieces.values() for piece in pieces}
        yield from read_weights(directory, self.model, own)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the masters from whole tensors under their checkpoint names."""
        wanted: dict[str, list[tuple[Tensor, Piece]]] = {}
        for local, pieces in self.pieces.items():
            for piece in pieces:
                wanted.setdefault(piece.name, []).append((self.tensors[local], piece))
        for name, tensor in tensors:
            for local, piece in wanted.pop(name, ()):
                cut = (
                    tensor[slice(*piece.rows)] if piece.cols is None else tensor[slice(*piece.rows), slice(*piece.cols)]
                )
                local.data[piece.at : piece.at + len(cut)].copy_(cut)
        if wanted:
            raise RunError(f"{len(wanted)} tensors did not come, {min(wanted)} among them")
        with cpu.here():
            self.optimizer.reload_model_params()
        self.arithmetic.renew()

    def _rounded(self) -> dict[str, Tensor]:
        """This rank's tensors as the 16-bit model holds them."""
        return {name: self._round(name, tensor.detach()).clone() for name, tensor in self.tensors.items()}

    def _round(self, local: str, tensor: Tensor) -> Tensor:
        return tensor if local.endswith("expert_bias") else self.exp.precision.plain.round(tensor)

    def save(self, directory: str) -> None:
        """Weights and optimiser state as torch_dist, each rank its part; counters as JSON."""
        at = Path(directory)
        if self.rank == 0:
            (at / STATE).mkdir()
        torch.distributed.barrier()
        with cpu.here():
            dist_checkpointing.save(self._sharded(), str(at / STATE), ("torch_dist", 1))
        if self.rank == 0:
            counters = {"version": self.version, "updates": self.updates, "kept": sorted(self._kept())}
            (at / TRAINER).write_text(json.dumps(counters))

    def restore(self, directory: str) -> int:
        """Everything from a checkpoint of any layout; the version."""
        at = Path(directory)
        state = json.loads((at / TRAINER).read_text())
        for name in state["kept"]:
            setattr(self, name, {local: t.detach().clone() for local, t in self.tensors.items()})
        with cpu.here():
            found = dist_checkpointing.load(self._sharded(loading=True), str(at / STATE))
            self.network.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            for name in state["kept"]:
                setattr(self, name, found[name])
        self.version, self.updates = state["version"], state["updates"]
        self.arithmetic.renew()
        return self.version

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        """Weights beside the newest: those one version back, and the reference's."""
        kept = {"previous": self.previous, "reference": self.reference}
        return {name: tensors for name, tensors in kept.items() if tensors is not None}

    def _sharded(self, loading: bool = False) -> dict[str, Any]:
        """Everything that a checkpoint holds, with the place of each shard in the whole."""
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        facts = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": data}
        model = self.network.sharded_state_dict(metadata=facts)
        state = {"model": model}
        state["optimizer"] = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=facts)
        for name, tensors in self._kept().items():
            beside = self.network.sharded_state_dict(metadata=facts)
            state[name] = {local: shard for local, shard in beside.items() if local in tensors}
            for local, shard in state[name].items():
                shard.key, shard.data = f"{name}.{shard.key}", tensors[local]
        return state

    # -- what it promises --------------------------------------------------------------------------
    def contract(self) -> dict[str, str]:
        """What this rank would publish, from its own copy of the config."""
        return self.exp.wire.contract(self.params, self.moe)

    def count_buckets(self) -> int:
        return len(self.buckets)

    def ship(self, version: int, bucket: int) -> tuple[dict[str, dict[str, Frozen]], None]:
        """Gather a bucket of whole tensors on the first rank and quantise it there: {name: parts} as they travel."""
        from lpexp.precision.wire import freeze

        begin = time.perf_counter()
        if bucket == 0:
            self._held, self._stats, self._quantize_s = {}, QuantStats(self.exp.wire), 0.0
        frozen = {}
        for param, weight in self.gathered(self._weights_of(version), self.buckets[bucket]):
            parts = side(param, self.exp.wire, self.moe).quantize(weight, param.name)
            if self.exp.wire.covers(param, self.moe):
                self._stats.add(param, weight, parts)
            frozen[param.name] = freeze(parts)
        self._held |= frozen
        self._quantize_s += time.perf_counter() - begin
        return frozen, None

    def shipped(self, version: int) -> SyncReport:
        """What the buckets were, all together."""
        from lpexp.precision.wire import checksum_frozen, quantized_share

        size = sum(raw.nbytes for parts in self._held.values() for _, _, raw in parts.values())
        share = quantized_share(self.params, self.exp.wire, self.moe)
        sent, self._held = checksum_frozen(self._held), {}
        return SyncReport(version, size, {"quantize": self._quantize_s}, sent, (), share, self._stats.result())

    def _weights_of(self, version: int) -> dict[str, Tensor]:
        if version == self.version:
            return self.tensors
        if version == self.version - 1 and self.previous is not None:
            return self.previous
        raise RunError(f"version {version} is not at hand: the trainer is at {self.version}")

    @torch.no_grad()
    def gathered(self, tensors: dict[str, Tensor], params: Iterable[Param]) -> Iterator[tuple[Param, Tensor]]:
        """On the first rank: whole tensors of these as float32 values of the 16-bit model. All ranks call it."""
        params = list(params)
        whole = {param.name: torch.empty(param.shape) for param in params} if self.rank == 0 else {}
        givers = sorted({rank for param in params for rank, _, _ in self.owners[param.name]})
        for giver in givers:
            pieces = [(l, p) for param in params for rank, l, p in self.owners[param.name] if rank == giver]
            if self.rank == giver:
                cut = [_cut(self._round(local, tensors[local].detach()), piece) for local, piece in pieces]
                flat = torch.cat([part.reshape(-1) for part in cut])
            if giver != 0:
                size = sum(
                    _size(piece, param) for param in params for r, _, piece in self.owners[param.name] if r == giver
                )
                if self.rank == giver:
                    torch.distributed.send(flat, 0)
                elif self.rank == 0:
                    flat = torch.empty(size, device=next(iter(self.tensors.values())).device)
                    torch.distributed.recv(flat, giver)
            if self.rank == 0:
                for _, piece in pieces:
                    target = whole[piece.name][slice(*piece.rows)]
                    target = target if piece.cols is None else target[:, slice(*piece.cols)]
                    target.copy_(flat[: target.numel()].view(target.shape))
                    flat = flat[target.numel() :]
        for param in params if self.rank == 0 else ():
            yield param, whole.pop(param.name)

    def exported(self) -> dict[str, Tensor]:
        """Whole tensors of the 16-bit model on the first rank; for models of a size that fits there."""
        return {param.name: tensor for param, tensor in self.gathered(self.tensors, self.params)}

    def effective(self) -> dict[str, list[tuple[Piece, Parts]]]:
        """{checkpoint name: (piece, its parts)} of every matrix of this rank that the layers multiply with."""
        found: dict[str, list[tuple[Piece, Parts]]] = {}
        for at, module in self.network.named_modules():
            if isinstance(module, Linear):
                parts = self.arithmetic.parts(module, self.tensors[f"{at}.weight"])
                for piece in self.pieces[f"{at}.weight"]:
                    found.setdefault(piece.name, []).append((piece, parts[piece.name]))
        return found

    # -- learning ----------------------------------------------------------------------------------
    def step(self, batch: Batch) -> dict[str, Any]:
        """This rank's share of a batch: `updates_per_batch` optimiser steps."""
        with cpu.here():
            return self._step(batch)

    def _step(self, batch: Batch) -> dict[str, Any]:
        exp, begin = self.exp, time.perf_counter()
        updates = [self._micro_batches(batch, *rows) for rows in self._update_rows(len(batch))]
        mine = [rows for update in updates for rows in update]
        stale = bool((batch.versions_N < self.version).any())
        ahead = len(updates) > 1 or stale
        found = Found(batch)
        if ahead:  # later updates and stale samples need the log-probabilities from before the first update
            for start, (lp_P, entropy) in self._scores(batch, mine).items():
                found.put("lp_P", start, lp_P)
                found.put("entropy", start, entropy)
                if not stale:
                    found.put("lp_T", start, lp_P)
            if stale:
                with self._sampled_by(batch):
                    for start, (lp_T, _) in self._scores(batch, mine).items():
                        found.put("lp_T", start, lp_T)
        references: dict[int, Scored] = {}
        if self.reference is not None:
            with self._holding(self.reference, exp.reference.precision):
                references = self._scores(batch, mine)
        recompute = time.perf_counter() - begin
        if exp.lag:
            self.previous = self._rounded()
        sums: dict[str, float] = {}
        norms, clipped, optimizer_s, lr = [], 0, 0.0, 0.0
        for update, (first, last) in zip(updates, self._update_rows(len(batch)), strict=True):
            whole = batch.rows(first, last)
            num_tokens, num_samples = int(whole.mask_NT.sum()), len(whole)

            def learn(start: int, part: Batch, scored: Scored) -> Tensor:
                lp_ref = references[start][0] if references else None
                loss, terms = policy_loss(exp, part, found, start, scored, lp_ref, ahead, num_tokens, num_samples)  # noqa: B023
                if self.tells:
                    for name, value in {"loss": loss, **terms}.items():
                        sums[name] = sums.get(name, 0.0) + float(value.detach())
                return loss

            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            self._run(batch, update, learn, learning=True)
            mark = time.perf_counter()
            lr = self._set_lr()
            _, norm, _ = self.optimizer.step()
            norm = float(norm)
            if not np.isfinite(norm):
                raise RunError(
                    f"step {batch.step}: the gradient norm is {norm}; lower trainer.lr or look at the batch in record/"
                )
            clipped += norm > self.spec.clip_grad
            norms.append(norm)
            self.arithmetic.renew()
            optimizer_s += time.perf_counter() - mark
        self.version += 1
        return {
            "found": found.mine(updates) if self.tells else [],
            "sums": sums,
            "grad_norm": float(np.mean(norms)),
            "grad_clip_frac": clipped / len(norms),
            "lr": lr,
            "param_norm": self._param_norm(),
            "recompute": "forward" if ahead else "shared",
            "seconds": {"recompute": recompute, "optimizer": optimizer_s, "learn": time.perf_counter() - begin},
        }

    def _update_rows(self, size: int) -> list[Rows]:
        share = size // self.exp.algorithm.updates_per_batch
        return [(first, first + share) for first in range(0, size, share)]

    def _micro_batches(self, batch: Batch, first: int, last: int) -> list[Rows]:
        """The (start, stop) rows of this rank's micro-batches; every data-parallel rank has as many."""
        rank, ranks = self.data
        each = (last - first) // ranks
        room = max(self.spec.max_tokens_per_gpu // self._width(batch), 1)
        edges = np.linspace(0, each, -(-each // room) + 1).astype(int) + first + rank * each
        return list(itertools.pairwise(edges.tolist()))

    def _width(self, part: Batch) -> int:
        """Padded tokens a row: a multiple of the tensor-parallel size, which shares the sequence out."""
        longest = int(part.lengths_N.max())
        return longest + -longest % self.spec.tp

    def _set_lr(self) -> float:
        self.updates += 1
        spec = self.spec
        lr = spec.lr * min(1.0, self.updates / spec.lr_warmup_steps) if spec.lr_warmup_steps else spec.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _param_norm(self) -> float:
        """L2 norm of all masters that are trained."""
        total = torch.zeros((), dtype=torch.float64)
        for owners in self.owners.values():
            for rank, local, piece in owners:
                if rank == self.rank and not local.endswith("expert_bias"):
                    total += _cut(self.tensors[local].detach(), piece).double().square().sum().cpu()
        total = total.to(next(iter(self.tensors.values())).device)
        torch.distributed.all_reduce(total)
        return float(total.sqrt())

    @contextlib.contextmanager
    def _holding(self, tensors: dict[str, Tensor], precision: Precision | None = None) -> Iterator[None]:
        """Other weights in the place of the newest, and another precision to compute in."""
        newest = {name: tensor.data for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            tensor.data = tensors[name]
        self.arithmetic.use(precision or self.exp.precision)
        try:
            yield
        finally:
            for name, tensor in self.tensors.items():
                tensor.data = newest[name]
            self.arithmetic.use(self.exp.precision)

    @contextlib.contextmanager
    def _sampled_by(self, batch: Batch) -> Iterator[None]:
        """The weights that sampled a batch in the place of the newest."""
        versions = np.unique(batch.versions_N)
        if len(versions) != 1 or versions[0] not in (self.version, self.version - 1):
            raise RunError(
                f"step {batch.step}: samples of versions {versions.tolist()} are refused, "
                f"the trainer is at {self.version}"
            )
        if self.previous is None:
            raise RunError(f"step {batch.step}: the weights of version {versions[0]} are not at hand")
        with self._holding(self.previous):
            yield

    def _scores(self, batch: Batch, rows: list[Rows]) -> dict[int, Scored]:
        """{first row of a micro-batch: what is scored of it}; filled on the last stage."""
        found: dict[int, Scored] = {}

        def keep(start: int, part: Batch, scored: Scored) -> Tensor:
            found[start] = scored
            return torch.zeros((), device=scored[0].device)

        with torch.no_grad():
            self._run(batch, rows, keep, learning=False)
        return found

    def _run(self, batch: Batch, rows: list[Rows], use: Callable[[int, Batch, Scored], Tensor], learning: bool) -> None:
        """Micro-batches through all stages; `use` is told on the last one what was scored, and gives the loss."""

        def forward(micro_batches: Iterator[Rows], ddp: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            start, stop = next(micro_batches)
            part = batch.rows(start, stop)
            tokens = torch.zeros(len(part), self._width(part), dtype=torch.long)
            given = torch.from_numpy(part.tokens_NT[:, : tokens.shape[1]].astype(np.int64))
            tokens[:, : given.shape[1]] = given
            tokens = tokens.to(next(iter(self.tensors.values())).device)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            hidden = ddp(tokens, positions, None)  # [T / tp, B, H]

            def loss(hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
                found = use(start, part, self._score(hidden, tokens, part))
                # Undone by the schedule, which means over micro-batches, and by the gradients' mean over ranks.
                return found * len(rows) * self.data[1], {}

            return hidden, loss

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(rows),
            model=[self.ddp],
            num_microbatches=len(rows),
            seq_length=self._width(batch),
            micro_batch_size=max(stop - start for start, stop in rows),
            forward_only=not learning,
        )

    def _score(self, hidden: Tensor, tokens: Tensor, part: Batch) -> Scored:
        if self.spec.tp > 1:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        n, t = (torch.from_numpy(at).to(tokens.device) for at in np.nonzero(part.mask_NT))
        temperature = self.exp.rollout.temperature
        return network.score(hidden[t - 1, n], self.network.head, tokens[n, t], temperature, self.arithmetic)


def _cut(local: Tensor, piece: Piece) -> Tensor:
    """The piece's rows of the local tensor."""
    return local[piece.at : piece.at + piece.rows[1] - piece.rows[0]]


def _size(piece: Piece, param: Param) -> int:
    """Elements of a piece."""
    rest = param.shape[1:] if piece.cols is None else (piece.cols[1] - piece.cols[0],)
    return (piece.rows[1] - piece.rows[0]) * math.prod(rest)
