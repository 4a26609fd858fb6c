"""The `lpexp` command: what belongs to no single run. Training is `python launch.py`.

Left out here: the work itself; each subcommand's module is imported when it is called.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lpexp import attribute, compare, convert, evaluate, export, fetch
from lpexp.errors import ConfigError, RunError

COMMANDS = (
    ("attribute", attribute, "what makes the gap between trainer and rollout: causes, modules, tokens"),
    ("compare", compare, "two runs, side by side or bit for bit"),
    ("export", export, "a run's checkpoint as a Hugging Face directory, in any precision"),
    ("eval", evaluate, "checkpoints under several serving precisions, as a matrix"),
    ("convert", convert, "a Hugging Face directory in another precision"),
    ("fetch", fetch, "bring a real model's weights: smollm2_135m, or an org/name of the hub"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 fine, 1 a difference or a failure, 2 refused."""
    parser = argparse.ArgumentParser(prog="lpexp", description="What does a precision do to reinforcement learning?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    doctor.set_defaults(run=_doctor)
    for word, module, does in COMMANDS:
        one = commands.add_parser(word, help=does)
        module.add_arguments(one)
        one.set_defaults(run=module.main)
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
