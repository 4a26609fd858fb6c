"""python launch.py key=value ...: compose a config, judge it, run it. `--help` lists the keys that people change.

Exit codes: 0 done or dry run, 1 a run failed, 2 refused (config, file or hardware), 130 and 143 stopped and resumable.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from lpexp import frontend, plan
from lpexp.errors import ConfigError


@hydra.main(version_base="1.3", config_path=str(frontend.CONF), config_name="config")
@frontend.told()
def main(cfg: DictConfig) -> None:
    exp = frontend.judge(cfg)
    if exp.dry_run:
        print(plan.text(exp))
        return
    if lacking := plan.missing(exp):
        print(plan.text(exp))
        raise ConfigError(lacking)
    frontend.run_begins()
    from lpexp.loop import run  # torch and ray are first imported here

    sys.exit(run(exp, frontend.overrides()))


if __name__ == "__main__":
    sys.exit(frontend.guard(main, sys.argv[1:]))
