"""The cards of conf/correction/ as specs; what a card leaves to be set is set."""

from __future__ import annotations

from typing import Any

from lpexp import frontend
from lpexp.config import load
from lpexp.correction import Correction

SET: dict[str, dict[str, dict[str, Any]]] = {
    "opsm": {"opsm": {"delta": 0.5}},
    "seq_error": {"seq_error": {"error_max": 1.2}},
    "reject_k2": {"reject": {"kl_max": 0.1}},
}


def card(name: str, **changes: dict[str, Any]) -> Correction:
    """A card with `part={field: value}` changed."""
    data: dict[str, Any] = frontend.read_choice("correction", name)
    for given in (SET.get(name, {}), changes):
        for part, fields in given.items():
            data[part] = {**data[part], **fields}
    return load(data, Correction)
