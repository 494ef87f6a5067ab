"""Draw what `python -m optimjax bench --json > bench.json` has measured.

`python benchmarks/picture.py bench.json bench.png` makes a panel for each case, with a bar for each contender: how long
it takes, relative to the first, which is ours. Lines show the middle half of the turns.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"optimjax": "#0072B2", "one after": "#0072B2", "optax": "#E69F00", "nnx": "#E69F00", "PyTorch": "#CC3377"}


def draw(found: dict[str, Any]) -> Figure:
    cases = found["cases"]
    figure = Figure(figsize=(9, 0.8 + 0.26 * sum(len(case["contenders"]) + 2 for case in cases)), dpi=150)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=[len(case["contenders"]) for case in cases])
    for ax, case in zip(panels[:, 0], cases, strict=True):
        names = [one["name"] for one in case["contenders"]]
        longer = [1 / one["ours_of_it"] for one in case["contenders"]]
        # The quartiles are of ours in its time, so they change places.
        reach = [[1 / one["quartiles"][1 - end] for one in case["contenders"]] for end in (0, 1)]
        errors = [[abs(a - b) for a, b in zip(longer, ends, strict=True)] for ends in reach]
        colours = [next(colour for start, colour in COLOURS.items() if name.startswith(start)) for name in names]
        ax.barh(names, longer, xerr=errors, color=colours, ecolor="#444444", height=0.7)
        for place, (value, one) in enumerate(zip(longer, case["contenders"], strict=True)):
            end = max(value, reach[1][place])
            ax.annotate(
                f"{_milliseconds(one['median_s'])} ms", (end, place), (5, 0), textcoords="offset points", va="center"
            )
        ax.axvline(1, color="#888888", linewidth=0.8, zorder=0)
        ax.set_title(case["title"], loc="left", fontsize="medium")
        ax.set_xlim(0, 1.15 * max(reach[1]))
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("time relative to the first bar of the panel: shorter is faster")
    machine = found["machine"]
    devices = ", ".join(machine["devices"])
    versions = f"jax {machine['packages']['jax']}, {machine['system']['processor']}, {machine['system']['cores']} cores"
    figure.suptitle(f"{devices}; {versions}", fontsize="medium")
    return figure


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text())).savefig(options.out)


if __name__ == "__main__":
    main()
