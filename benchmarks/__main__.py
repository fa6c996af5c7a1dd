# SPDX-License-Identifier: Apache-2.0
"""Run a suite, append its rows to a file of JSON lines, and print their medians over seeds as a table.

python -m benchmarks posteriors [--only NAME;...] [--samplers nuts;smc;dis;sbtm] [--seeds 3] [--output FILE]
python -m benchmarks diffusions [--only NAME;...] [--samplers default] [--seeds 3] [--output FILE]
python -m benchmarks sbtm [--only NAME;...] [--samplers sbtm;langevin] [--seeds 5] [--output FILE]
python -m benchmarks steps [--only "256 x 64"] [--output FILE]
"""

import argparse
import json
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

from benchmarks import diffusions, posteriors, steps, transport

SUITES = {"diffusions": diffusions, "posteriors": posteriors, "sbtm": transport, "steps": steps}


def provenance():
    """Where and with what a row was measured."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "numpyro", "blackjax", "flax", "optax")},
    }


def median(rows):
    """The median of every number; of other values the most frequent one."""
    found = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        number = isinstance(first, int | float) and not isinstance(first, bool)
        found[name] = statistics.median(values) if number else statistics.mode(values)
    return found


def line(cells):
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", default="", help="names of problems with semicolons between them")
    parser.add_argument("--samplers", default="", help="names of samplers with semicolons between them")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--output", type=Path, help="a file of JSON lines to append to")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    problems = [name for name in args.only.split(";") if name] or list(suite.PROBLEMS)
    samplers = [name for name in args.samplers.split(";") if name] or list(suite.SAMPLERS)
    for name, known in ((problems, suite.PROBLEMS), (samplers, suite.SAMPLERS)):
        if unknown := set(name) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {'; '.join(known)}")
    origin = provenance()
    print(line(suite.COLUMNS) + "\n|" + "---|" * len(suite.COLUMNS))
    for problem in problems:
        for sampler in samplers:
            rows = []
            for seed in range(args.seeds):
                rows.append(suite.measure(problem, sampler, seed))
                if args.output:
                    with args.output.open("a") as lines:
                        row = {"suite": args.suite, "seed": seed, **rows[-1]}
                        lines.write(json.dumps(row | origin) + "\n")
            print(line(suite.cells(median(rows))), flush=True)


if __name__ == "__main__":
    main()
