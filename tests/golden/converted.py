"""Writes tests/golden/converted/: what `lpexp convert` makes of a tiny model, two directories whole, of others digests.

python -m tests.golden.converted
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from lpexp.convert import convert
from tests.convert.directories import GOLDEN, WAYS, digests, golden_weights, plain

HERE = Path(__file__).parent / "converted"
WHOLE = ("fp8", "int4 g32")

if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    manifest = {}
    with tempfile.TemporaryDirectory() as folder:
        source = plain(Path(folder) / "source", GOLDEN, golden_weights())
        for way, (_, precision) in WAYS.items():
            out = Path(folder) / way.replace(" ", "_").replace("/", "")
            convert(source, out, precision)
            manifest[way] = digests(out)
            if way in WHOLE:
                shutil.copytree(out, HERE / out.name)
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
