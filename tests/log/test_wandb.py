"""wandb gets what the journal has, and can cost a run nothing but a warning."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from lpexp import journal
from lpexp.log import Log

pytestmark = pytest.mark.usefixtures("no_wandb_environment")

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: a LevelDB log behind 7 bytes of its own, checksums verified.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md; wandb sums with zlib's CRC-32.
    """
    from wandb.proto import wandb_internal_pb2

    kinds: Any = wandb_internal_pb2  # its classes are made at import

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block that has no room for a header is padding
            at += BLOCK - at % BLOCK
            continue
        checksum, size, kind = data[at : at + 4], int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        body = data[at + HEADER : at + HEADER + size]
        assert int.from_bytes(checksum, "little") == zlib.crc32(bytes([kind]) + body)
        parts, at = parts + body, at + HEADER + size
        if kind in (1, 4):  # whole, or the last part
            record = kinds.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_back(run_dir: Path) -> list[tuple[Any, dict[str, Any], list[dict[str, Any]]]]:
    """(run record, config, history rows) of each .wandb file of a run, in the order of their making."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        run, config, rows = None, {}, []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                config = {item.key: json.loads(item.value_json) for item in run.config.update}
            elif kind == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        found.append((run, config, rows))
    return found


def test_the_offline_file_has_every_number_of_the_journal_and_the_config(experiment, tmp_path: Path, made_up) -> None:
    exp = experiment("wandb.mode=offline", "wandb.group=ladder", "wandb.tags=[fp8,seed1]", "wandb.project=numerics")
    log = Log(exp, tmp_path, 0, [], "cafe")
    made_up.feed(log, range(3))
    log.close()
    ((run, config, rows),) = read_back(tmp_path)
    written = journal.read(tmp_path / "metrics.jsonl")
    assert len(rows) == len(written) == 3 and len(written[0]) > 100
    for row, line in zip(rows, written, strict=True):
        assert {key: row[key] for key in line} == line
        assert row["_step"] == line["step"]
    expected = json.loads(json.dumps(exp.dump()))
    assert {key: config[key] for key in expected} == expected
    assert (run.run_group, list(run.tags), run.project) == ("ladder", ["fp8", "seed1"], "numerics")
    assert run.display_name == exp.name


def test_a_resumed_run_goes_on_under_the_same_wandb_id(experiment, tmp_path: Path, made_up) -> None:
    exp = experiment("wandb.mode=offline")
    for start in (0, 2):
        log = Log(exp, tmp_path, start, [], "cafe")
        made_up.feed(log, range(start, 3))
        log.close()
    (first, _, before), (second, _, after) = read_back(tmp_path)
    assert first.run_id == second.run_id == (tmp_path / "wandb_id.txt").read_text().strip()
    assert [row["step"] for row in before] == [0, 1, 2] and [row["step"] for row in after] == [2]


def test_wandb_that_cannot_be_reached_costs_a_warning_only(
    experiment, tmp_path: Path, made_up, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing answers
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("lpexp.log.WANDB_TIMEOUT_S", 1)
    wandb.teardown()  # it reads its variables once
    log = Log(experiment("wandb.mode=online"), tmp_path, 0, [], "cafe")
    made_up.feed(log, range(3))
    log.close()
    warned = [event["message"] for event in journal.read(tmp_path / "events.jsonl") if event["kind"] == "wandb"]
    assert "wandb init failed" in warned[0] and "wandb sync" in warned[1]
    assert "warning: wandb init failed" in capsys.readouterr().out
    assert [line["step"] for line in journal.read(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert len(read_back(tmp_path)[-1][2]) == 3  # written offline instead


def test_wandb_that_breaks_on_the_way_costs_a_warning_only(experiment, tmp_path: Path, made_up, monkeypatch) -> None:
    log = Log(experiment("wandb.mode=offline"), tmp_path, 0, [], "cafe")
    made_up.feed(log, range(1))
    run = wandb.run
    assert run is not None

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr(run, "log", broken)
    made_up.feed(log, range(1, 3))
    log.close()
    run.finish()
    warned = [event["message"] for event in journal.read(tmp_path / "events.jsonl") if event["kind"] == "wandb"]
    assert len(warned) == 1 and "the service is gone" in warned[0]
    assert [line["step"] for line in journal.read(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_disabled_wandb_writes_nothing(ran) -> None:
    assert not (ran() / "wandb").exists()
