"""What a name on the Hugging Face hub is on this machine: looked up in the hub's own cache, never downloaded here.

`hub:OWNER/NAME` is a model, `hub:OWNER/NAME/FILE` a file of a data set. A plan needs neither, so a recipe is judged on
any machine; a run that lacks one is refused with the command that brings it.
"""

from __future__ import annotations

import re
from pathlib import Path

HUB = "hub:"
_PART = r"[A-Za-z0-9][\w.-]*"
MODEL, FILE = re.compile(rf"{HUB}({_PART}/{_PART})"), re.compile(rf"{HUB}({_PART}/{_PART})/([\w./-]+)")


def model(name: str) -> Path | None:
    """The directory of `hub:OWNER/NAME`; None while it is not there whole."""
    from huggingface_hub import errors, snapshot_download

    found = MODEL.fullmatch(name)
    assert found is not None, name
    try:
        return Path(snapshot_download(found[1], local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def file(name: str) -> Path | None:
    """The path of `hub:OWNER/NAME/FILE`; None while it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = FILE.fullmatch(name)
    assert found is not None, name
    cached = try_to_load_from_cache(found[1], found[2], repo_type="dataset")
    return Path(cached) if isinstance(cached, str) else None


def command(name: str) -> str:
    """What brings it: the hub's own command line, which comes with huggingface_hub."""
    if data := FILE.fullmatch(name):
        return f"hf download --repo-type dataset {data[1]} {data[2]}"
    return f"hf download {name.removeprefix(HUB)}"
