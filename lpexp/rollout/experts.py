"""Routers' choices as an engine outside of this package returns them, for `Sample.experts`.

SGLang, started with --enable-return-routed-experts and asked with `return_routed_experts`, answers with base64 of
little-endian int32 [prompt + response - 1, layers, top_k] in meta_info["routed_experts"]; its dense layers hold no
choice. Left out: experts placed twice (their ids must be logical ones), and asking for them (the rollout's own affair).
"""

from __future__ import annotations

import base64
import binascii

import numpy as np

from lpexp.errors import RunError
from lpexp.model import Model


def returned_experts(answer: str | bytes | np.ndarray, tokens: int, model: Model) -> np.ndarray:
    """The choices of one sample, int16 [tokens - 1, moe layers, top_k]; RunError that names what does not fit.

    `tokens` counts prompt and response; what was answered may hold every layer or the mixture-of-experts ones only.
    """
    assert model.moe is not None, "a dense model routes nothing"
    if isinstance(answer, str | bytes):
        try:
            answer = np.frombuffer(base64.b64decode(answer, validate=True), "<i4")
        except (binascii.Error, ValueError) as error:
            raise RunError(f"routed experts are not base64 of int32 ({error})") from None
    routed = [layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)]
    places = (tokens - 1) * model.moe.top_k
    layers, rest = divmod(answer.size, places)
    if rest or layers not in (len(routed), model.num_hidden_layers):
        raise RunError(
            f"{answer.size} routed experts came for {tokens} tokens; {tokens - 1} x {model.moe.top_k} for each of "
            f"{model.num_hidden_layers} layers, or of the {len(routed)} with experts, are expected"
        )
    found = answer.reshape(tokens - 1, layers, model.moe.top_k)
    found = found if layers == len(routed) else found[:, routed]
    if found.size and not 0 <= found.min() <= found.max() < model.moe.num_experts:
        raise RunError(
            f"routed experts run from {found.min()} to {found.max()}; {model.name} has 0 to {model.moe.num_experts - 1}"
        )
    return found.astype(np.int16)
