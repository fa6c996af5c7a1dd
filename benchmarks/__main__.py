# SPDX-License-Identifier: Apache-2.0
"""Run a suite, append its rows to a file of JSON lines, and print their medians over seeds as a table.

python -m benchmarks posteriors [--only NAME;...] [--samplers nuts;smc;dis;sbtm] [--seeds 3] [--output FILE]
python -m benchmarks price [--only NAME;...] [--samplers nuts;dis;sbtm] [--seeds 3] [--output FILE]
python -m benchmarks diffusions [--only NAME;...] [--samplers NAME] [--seeds 3] [--output F] [--report DIR]
python -m benchmarks sbtm [--only NAME;...] [--samplers sbtm;langevin] [--seeds 5] [--output F] [--report DIR]
python -m benchmarks steps [--only "256 x 64"] [--output FILE]
python -m benchmarks estimators [--only NAME;...] [--seeds 3] [--output FILE]
python -m benchmarks images [--only NAME;...] [--samplers NAME;...] [--seeds 3] [--output F] [--report DIR]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

from benchmarks import diffusions, estimators, images, posteriors, price, steps, transport

SUITES = {
    "diffusions": diffusions,
    "estimators": estimators,
    "images": images,
    "posteriors": posteriors,
    "price": price,
    "sbtm": transport,
    "steps": steps,
}


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


def save(figure, folder, name):
    """Save a figure and close it; returns the line of a report that shows it."""
    import matplotlib.pyplot as plt

    file = "".join(c if c.isalnum() else "-" for c in name) + ".png"
    figure.savefig(folder / file, dpi=100)
    plt.close(figure)
    return f"![{name}]({file})"


def names(text):
    """Split a list at its semicolons; spaces around names, as those of a new line, do not count."""
    return [name.strip() for name in text.split(";") if name.strip()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", default="", help="names of problems with semicolons between them")
    parser.add_argument("--samplers", default="", help="names of samplers with semicolons between them")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--output", type=Path, help="a file of JSON lines to append to")
    parser.add_argument("--report", type=Path, help="a folder for the table with pictures of the first seed")
    args = parser.parse_args()
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
    suite = SUITES[args.suite]
    problems = names(args.only) or list(suite.PROBLEMS)
    samplers = names(args.samplers) or list(suite.SAMPLERS)
    for given, known in ((problems, suite.PROBLEMS), (samplers, suite.SAMPLERS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {'; '.join(known)}")
    origin = provenance()
    lines = [line(suite.COLUMNS), "|" + "---|" * len(suite.COLUMNS)]
    print(*lines, sep="\n")
    pictures, every = [], []
    for problem in problems:
        for sampler in samplers:
            if hasattr(suite, "applies") and not suite.applies(problem, sampler):
                print(f"'{sampler}' is not defined for '{problem}'.", file=sys.stderr)
                continue
            rows = []
            for seed in range(args.seeds):
                rows.append({"seed": seed, **suite.measure(problem, sampler, seed)})
                figure = rows[-1].pop("figure", None)
                if args.report and figure and seed == 0:
                    pictures.append(save(figure(), args.report, f"{problem}, {sampler}"))
                if args.output:
                    with args.output.open("a") as file:
                        row = {"suite": args.suite, **rows[-1]}
                        file.write(json.dumps(row | origin) + "\n")
            every += rows
            lines.append(line(suite.cells(median(rows))))
            print(lines[-1], flush=True)
    if args.report:
        if hasattr(suite, "overview"):
            pictures.insert(0, save(suite.overview(every), args.report, "overview"))
        head = f"# {args.suite}\n\nMedians of {args.seeds} seeds. {json.dumps(origin)}"
        text = "\n\n".join([head, "\n".join(lines), *pictures])
        (args.report / "report.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
