"""How long the command line takes to answer when there is no work to do: `python benchmarks/startup.py`.

Wall time of whole processes over 10 runs, after one that is not counted. `--help` should take under 0.3 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("--help", "recipes ls")
RUNS = 10


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    program = str(Path(sys.executable).with_name("salt-vla"))
    baseline = {"python -c pass": [sys.executable, "-c", "pass"]}
    ours = {f"salt-vla {arguments}": [program, *arguments.split()] for arguments in COMMANDS}
    print(f"{'command':24} {'min s':>8} {'median s':>10}   ({RUNS} runs)")
    for name, command in (baseline | ours).items():
        seconds(command)
        times = [seconds(command) for _ in range(RUNS)]
        print(f"{name:24} {min(times):8.3f} {statistics.median(times):10.3f}")


if __name__ == "__main__":
    main()
