"""Runs megatron-core 0.16 without a GPU: what the library asks of CUDA by name is answered by the CPU.

`imported` brings the library in; `here` is entered around its construction and every use. Both change nothing where
torch sees a GPU. What is redirected: `torch.cuda`'s current device, streams, synchronisation and generators, every
`device=` that means CUDA, `Tensor.cuda()`, and the name that `Tensor.type()` gives (gradient clipping asserts it).
Left out: whatever computes differently; the arithmetic is torch's own on CPU tensors.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NAMES = {torch.float32: "Float", torch.float64: "Double", torch.bfloat16: "BFloat16", torch.float16: "Half"}


def needed() -> bool:
    return not torch.cuda.is_available()


@cache
def imported() -> Any:
    """The package megatron.core, ready for this machine; it warns of every accelerator library that it lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if needed():
            _answer_for_cuda()
        import megatron.core
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        from megatron.core.extensions import transformer_engine
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer import multi_latent_attention

        if not transformer_engine.HAVE_TE:  # what stands in for it there is taken for it here
            multi_latent_attention.HAVE_TE = False
        if needed():
            random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
            random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    return megatron.core


@contextlib.contextmanager
def here() -> Iterator[None]:
    """Around everything that megatron-core does."""
    with contextlib.ExitStack() as stack:
        if needed():
            stack.enter_context(_OnCpu())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


def _answer_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream = _Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)


class _Stream:
    """A queue of work that is always empty: a CPU has done what it was asked when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def wait(self, other: Any = None) -> None: ...


class _OnCpu(TorchFunctionMode):
    """Every torch function: devices that mean CUDA become the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = NAMES.get(args[0].dtype)
            return f"torch.cuda.{name}Tensor" if name else func(args[0])
        if kwargs and "device" in kwargs and _means_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _means_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **(kwargs or {}))


def _means_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or type(device) is int
