"""Draws first_token.svg from first_token.json: time to first token, cold and hit. Needs matplotlib."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent


def main() -> None:
    """Write the picture beside the figures."""
    measured = json.loads((HERE / "first_token.json").read_text())
    figure = Figure(figsize=(7, 2.9), layout="constrained")
    axes = figure.add_subplot()
    labels, rows = [], list(measured["seconds"].items())
    for place, (engine, seconds) in enumerate(reversed(rows)):
        for offset, (kind, colour) in zip((0.2, -0.2), (("cold", "#8a8f98"), ("hit", "#2a7f62")), strict=True):
            if kind in seconds:
                shift = offset if len(seconds) > 1 else 0
                axes.barh(place + shift, seconds[kind], height=0.36, color=colour, label=kind)
                axes.text(seconds[kind] * 1.06, place + shift, f"{seconds[kind]:.3g} s {kind}", va="center", fontsize=9)
        labels.append(engine)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xscale("log")
    axes.set_xlim(0.03, 20)
    axes.set_xlabel("seconds to the first token (logarithmic)")
    axes.set_title(measured["machine"], fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "first_token.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
