"""The rules of the Megatron-core trainer: what must divide what, and what needs a GPU or excludes another choice.

Each is a generator of Mistakes with keys from the root of the config. Left out: what only the library can say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lpexp.errors import Mistake
from lpexp.model import divisors
from lpexp.model.split import Ways, cuts

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.trainer.megatron import MegatronTrainerSpec

MOST_PARAMS_CORES = 1_000_000_000  # 16 bytes each, and one core a rank: what a laptop holds
GRADIENT_BYTES, MASTER_BYTES = 2 + 4, 12  # bf16 weight and float32 gradient; float32 master and two Adam moments


def broken(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """Every mistake of this trainer on this experiment."""
    yield from _sizes(spec, exp)
    yield from _layers(spec, exp)
    yield from _batch(spec, exp)
    yield from _shards(spec, exp)
    yield from _choices(spec, exp)
    yield from (_on_gpus if exp.cluster.world else _on_cores)(spec, exp)


def _sizes(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """Data-parallel sizes are whole; heads, keys and experts split evenly."""
    model, world = exp.model.sized(), spec.world(exp)
    what = f"{world} {'GPUs' if exp.cluster.world else 'ranks'}"
    what += " of the trainer" if exp.cluster.world > world else ""
    way = f"make their product divide {world}, or change model.parallel.nodes"
    if world % spec.copy_ranks:
        over = f"trainer.tp {spec.tp} x trainer.pp {spec.pp} x trainer.cp {spec.cp}"
        yield Mistake("trainer", f"{over} is {spec.copy_ranks}, which does not divide {what}; {way}")
    if model.moe and world % spec.expert_ranks:
        over = f"trainer.etp {spec.etp} x trainer.ep {spec.ep} x trainer.pp {spec.pp}"
        yield Mistake("trainer", f"{over} is {spec.expert_ranks}, which does not divide {what}; {way}")
    heads, keys = model.num_attention_heads, model.num_key_value_heads
    if heads % spec.tp:
        yield Mistake("trainer.tp", f"{spec.tp} does not divide {heads} heads; use one of {divisors(heads)}")
    elif model.mla is None and keys % spec.tp and spec.tp % keys:
        yield Mistake("trainer.tp", f"{spec.tp} neither divides {keys} heads of keys nor is a multiple of them")
    if model.moe is None:
        for key, value in (("ep", spec.ep), ("etp", spec.etp)):
            if value > 1:
                yield Mistake(f"trainer.{key}", f"{value}, but {model.name} has no experts; use 1")
    elif model.moe.num_experts % spec.ep:
        experts = model.moe.num_experts
        yield Mistake("trainer.ep", f"{spec.ep} does not divide {experts} experts; use one of {divisors(experts)}")


def _layers(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """Pipeline stages of equal depth, except that the last may be told apart."""
    layers, last = exp.model.sized().num_hidden_layers, spec.last_stage_layers
    if spec.pp == 1:
        if last is not None:
            yield Mistake("trainer.last_stage_layers", f"{last}, but trainer.pp 1 is one stage; use null")
        return
    rest, stages = (layers, spec.pp) if last is None else (layers - last, spec.pp - 1)
    if rest > 0 and rest % stages == 0:
        return
    told = "" if last is None else f", {last} of them in the last,"
    remainder = layers - (spec.pp - 1) * -(-layers // spec.pp)
    way = f"trainer.last_stage_layers={remainder} or " if remainder > 0 else ""
    message = f"{layers} layers{told} do not split evenly over {spec.pp} stages"
    yield Mistake("trainer.pp", f"{message}; use {way}a trainer.pp that divides {layers}")


def _batch(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """Every data-parallel copy gets as many samples of an optimiser step."""
    prompts, updates = exp.task.prompts_per_step, exp.algorithm.updates_per_batch
    if prompts % updates or spec.world(exp) % spec.copy_ranks:
        return  # told already
    samples, copies = prompts // updates * exp.algorithm.samples_per_prompt, spec.world(exp) // spec.copy_ranks
    if samples % copies:
        step = copies // math.gcd(copies, exp.algorithm.samples_per_prompt) * updates
        yield Mistake(
            "task.prompts_per_step",
            f"{prompts} prompts x {exp.algorithm.samples_per_prompt} samples / {updates} updates are {samples} "
            f"samples an update, which {copies} data-parallel copies cannot share equally; use a multiple of {step}",
        )


def _shards(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """No shard cuts a block or a group. On GPUs Transformer Engine quantises fused matrices whole."""
    linears = Ways(spec.tp, "trainer.tp", f"trainer.tp {spec.tp}", "trainer.tp={}".format)
    experts = Ways(spec.etp, "trainer.etp", f"trainer.etp {spec.etp}", "trainer.etp={}".format)
    fused = exp.cluster.world > 0
    yield from cuts(exp.model.sized(), exp.precision, linears, experts, fused, interleaved=True)


def _choices(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """Choices that exclude each other."""
    model = exp.model.sized()
    if exp.precision.gathered and spec.optimizer_offload:
        yield Mistake(
            "precision.param_gather",
            "true, but trainer.optimizer_offload is too: Megatron-core's Adam on the CPU cannot write parameters that "
            "are block-scaled codes; "
            "use precision.param_gather=false or trainer.optimizer_offload=false",
        )
    if spec.attention == "flash" and model.mla:
        why = "whose queries are longer than its values, which flash kernels do not all take"
        yield Mistake("trainer.attention", f"flash, but {model.name} has latent attention, {why}; use auto")
    if spec.dispatcher == "deepep" and spec.ep == 1:
        yield Mistake("trainer.dispatcher", "deepep, but trainer.ep 1 sends no token anywhere; use alltoall")


def _on_gpus(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """The GPUs compute this precision, and their memory holds a rank's share."""
    if spec.ranks is not None:
        yield Mistake("trainer.ranks", f"{spec.ranks}, but {exp.cluster.name} has GPUs: one rank each; use null")
    if exp.cluster.capability is not None:
        for mistake in exp.precision.needs(exp.cluster.capability, trains=True):
            key = f"precision.{mistake.key}" if mistake.key else "precision"
            yield Mistake(key, f"{mistake.message} (cluster.gpu {exp.cluster.gpu})")
    memory = exp.cluster.gpu_memory_gb
    if memory is not None and (held := state_gb(spec, exp)) > memory:
        yield Mistake(
            "trainer",
            f"weights, gradients and Adam take {held:.0f} GB a GPU before any activation and {exp.cluster.gpu} has "
            f"{memory:.0f}; split further (trainer.tp, pp, ep), add nodes, or set trainer.optimizer_offload=true",
        )


def _on_cores(spec: MegatronTrainerSpec, exp: Experiment) -> Iterator[Mistake]:
    """Without GPUs there is no Transformer Engine, and nothing to offload to."""
    cluster, model = exp.cluster.name, exp.model.sized()
    if model.num_params() > MOST_PARAMS_CORES:
        size = f"{model.num_params() / 1e9:.3g}e9 parameters"
        way = "type cluster=h200, or scale=laptop for its small twin"
        yield Mistake("cluster", f"{cluster} has no GPU, and {size} of {model.name} are too many for cores; {way}")
    gpu_only = {
        "trainer.cp": (spec.cp > 1, spec.cp, "context parallel needs Transformer Engine's attention", "1"),
        "trainer.dispatcher": (spec.dispatcher != "alltoall", spec.dispatcher, "it is a CUDA library", "alltoall"),
        "trainer.attention": (spec.attention != "auto", spec.attention, "its kernels are CUDA's", "auto"),
        "trainer.optimizer_offload": (spec.optimizer_offload, "true", "Adam is in host memory already", "false"),
        "precision.param_gather": (exp.precision.gathered, "true", "only Transformer Engine keeps codes", "false"),
    }
    for key, (wrong, value, why, use) in gpu_only.items():
        if wrong:
            yield Mistake(key, f"{value}, but cluster {cluster} has no GPU and {why}; use {use}")


def state_gb(spec: MegatronTrainerSpec, exp: Experiment) -> float:
    """1e9 bytes of weights, gradients and optimiser state on the fullest GPU; stages taken as equal."""
    model, world = exp.model.sized(), spec.world(exp)
    expert = sum(math.prod(p.shape) for p in model.params() if p.kind.startswith("expert_"))
    rest = model.num_params() - expert
    total = 0.0
    for count, ranks in ((rest, spec.tp * spec.pp), (expert, spec.expert_ranks)):
        replicas = max(world // ranks, 1)  # the distributed optimiser shares masters and moments out among them
        total += count / ranks * (GRADIENT_BYTES + (0 if spec.optimizer_offload else MASTER_BYTES / replicas))
    return total / 1e9
