"""The `lpexp` command: what belongs to no single run. Training is `python launch.py`.

Left out here: the work itself; each subcommand's module is imported when it is called.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lpexp import compare, convert, evaluate, export, fetch
from lpexp.errors import ConfigError, RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 fine, 1 a difference or a failure, 2 refused."""
    parser = argparse.ArgumentParser(prog="lpexp", description="What does a precision do to reinforcement learning?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    doctor.set_defaults(run=_doctor)
    between = commands.add_parser("compare", help="two runs, side by side or bit for bit")
    compare.add_arguments(between)
    between.set_defaults(run=compare.main)
    out = commands.add_parser("export", help="a run's checkpoint as a Hugging Face directory, in any precision")
    export.add_arguments(out)
    out.set_defaults(run=export.main)
    matrix = commands.add_parser("eval", help="checkpoints under several serving precisions, as a matrix")
    evaluate.add_arguments(matrix)
    matrix.set_defaults(run=evaluate.main)
    converter = commands.add_parser("convert", help="a Hugging Face directory in another precision")
    convert.add_arguments(converter)
    converter.set_defaults(run=convert.main)
    fetched = commands.add_parser("fetch", help="bring a real model's weights: smollm2_135m, or an org/name of the hub")
    fetch.add_arguments(fetched)
    fetched.set_defaults(run=fetch.main)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _doctor(args: argparse.Namespace) -> int:
    from lpexp.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
