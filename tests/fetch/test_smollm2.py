"""The real model, where it has been fetched: sensible text, sensible perplexity, parity with transformers, the zero."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lpexp import fetch, frontend
from lpexp.model import hf
from lpexp.model.decoder import Decoder, TrainWeights, token_logprobs
from lpexp.model.tokenizer import HfTokenizer
from lpexp.precision.fp32 import Fp32

pytestmark = pytest.mark.evidence

PROSE = (
    "Once upon a time there was a small village at the foot of a mountain. The people who lived there grew apples and "
    "kept sheep. Every morning the children walked to school along the river, and every evening they came home to eat "
    "dinner with their families. One day a young girl named Anna found a little dog by the side of the road. The dog "
    "was cold and hungry, so she took it home, gave it some food, and asked her mother if they could keep it."
)


@pytest.fixture(scope="module")
def directory() -> Path:
    """What `lpexp fetch smollm2_135m` has made; it is not made here."""
    found = fetch.find("fetched:smollm2_135m")
    assert found is not None, "type: lpexp fetch smollm2_135m"
    return found


@pytest.fixture(scope="module")
def ours(directory: Path) -> tuple[Decoder, TrainWeights, HfTokenizer]:
    model = hf.read_model(directory)
    weights = TrainWeights(model, Fp32(name="fp32"), hf.load_weights(directory, model))
    return Decoder(model), weights, HfTokenizer(directory)


def test_the_card_agrees_with_the_directory(directory: Path) -> None:
    model = frontend.experiment("model=smollm2_135m").model
    assert (model.name, model.path) == ("smollm2_135m", str(directory))


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [("The capital of France is", " Paris"), ("One, two, three, four,", " five"), ("The opposite of hot is", " cold")],
)
def test_greedy_text_makes_sense(ours: Any, text: str, goes_on: str) -> None:
    decoder, weights, tokenizer = ours
    with torch.inference_mode():
        logits = decoder.logits(weights, torch.tensor([tokenizer.encode(text)]))
    assert goes_on in tokenizer.decode(logits[0, -1].topk(3).indices.tolist())


def test_perplexity_on_simple_prose_is_that_of_a_working_model(ours: Any) -> None:
    decoder, weights, tokenizer = ours
    ids = torch.tensor([tokenizer.encode(PROSE)])
    with torch.inference_mode():
        logprobs, _ = token_logprobs(decoder.logits(weights, ids)[:, :-1], ids[:, 1:], 1.0)
    assert 3 < math.exp(-float(logprobs.mean())) < 30  # a shuffled q or k, or a wrong rope base, gives hundreds


def test_logits_are_those_of_transformers(ours: Any, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoder, weights, tokenizer = ours
    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(PROSE)])
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(directory)(PROSE).input_ids
    with torch.inference_mode():
        assert (decoder.logits(weights, ids) - peer(ids).logits).abs().max() < 1e-4
