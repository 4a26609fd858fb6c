"""sync/* and quant/* of one weight update. Formulas: the dictionary in lpexp/metric/__init__.py."""

from __future__ import annotations

from lpexp.data import Metrics, SyncReport
from lpexp.errors import RunError

PARTS = ("quantize", "transfer", "load")


def sync_metrics(report: SyncReport, previous: int | None = None) -> Metrics:
    """What a SyncReport says. `previous`: the version served before, None when this is the first sync.

    Raises RunError when an engine holds other bytes than were sent, when none reported, or a version is not the next.
    """
    if not report.checksums_held:
        raise RunError(f"sync/checksum_ok: no engine reported what it holds of version {report.version}")
    for engine, held in enumerate(report.checksums_held):
        if held != report.checksum_sent:
            raise RunError(
                f"sync/checksum_ok = 0: engine {engine} holds {held} of version {report.version}, the trainer sent "
                f"{report.checksum_sent}"
            )
    if previous is not None and report.version != previous + 1:
        raise RunError(f"sync/version: {report.version} follows {previous}; a sync raises it by exactly one")
    found: Metrics = {
        "sync/version": report.version,
        "sync/seconds": report.seconds.get("sync", sum(report.seconds.values())),
        "sync/bytes": report.bytes,
        "sync/quantized_param_frac": report.quantized_param_frac,
        "sync/checksum_ok": 1,
    }
    if report.canary is not None:
        found["sync/canary_abs_diff_mean"] = report.canary
    found |= {f"sync/{part}_seconds": report.seconds[part] for part in PARTS if part in report.seconds}
    for kind, values in report.quant.items():
        lossless = values.get("rel_error") == 0  # sqnr_db would be infinite
        found |= {f"quant/{kind}/{name}": v for name, v in values.items() if not (lossless and name == "sqnr_db")}
    return found
