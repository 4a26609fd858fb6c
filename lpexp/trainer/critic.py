"""The critic of an algorithm that has one: a linear value head in float32 beside the policy, with its own AdamW state.

It reads the policy's last hidden states as constants, so its gradient stops there. It starts at 0: every state is worth
nothing. Left out: layers of its own, weight decay, clipping of its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lpexp.trainer.adamw import Moments, adamw

if TYPE_CHECKING:
    from torch import Tensor

    from lpexp.algorithm.ppo import Ppo


class Critic:
    """V(state) = state @ weight + bias, kept as one flat vector [H + 1]."""

    def __init__(self, algorithm: Ppo, width: int, betas: tuple[float, float], eps: float, device: Any):
        import torch

        self.algorithm, self.betas, self.eps = algorithm, betas, eps
        self.head = torch.zeros(width + 1, device=device)
        self.moments = Moments(torch.zeros_like(self.head), torch.zeros_like(self.head))
        self.updates = 0

    def values(self, states: Tensor, head: Tensor | None = None) -> Tensor:
        """[R, H] hidden states -> [R] values, in units of the reward."""
        head = self.head if head is None else head
        return states.detach().float() @ head[:-1] + head[-1]

    def gradient(self, states: Tensor, before: Tensor, returns: Tensor, num_tokens: int) -> tuple[float, Tensor]:
        """These tokens' part of the value loss (a mean over the optimiser batch's tokens), and its gradient [H + 1]."""
        head = self.head.clone().requires_grad_()
        loss = self.algorithm.value_loss(self.values(states, head), before, returns).sum() / num_tokens
        loss.backward()
        assert head.grad is not None
        return float(loss.detach()), head.grad

    def step(self, gradient: Tensor) -> None:
        adamw(self.head, gradient, self.moments, self.updates, self.algorithm.critic_lr, self.betas, self.eps)
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; `load` takes it back."""
        import torch

        return {"head": self.head, **self.moments._asdict(), "updates": torch.tensor(self.updates)}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in {"head": self.head, **self.moments._asdict()}.items():
            tensor.copy_(state[name])
        self.updates = int(state["updates"])
