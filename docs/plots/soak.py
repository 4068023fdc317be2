"""Draws soak.svg from soak.json, what a soak has measured of its two servers. Needs matplotlib."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROWS = ("anonymous MiB", "descriptors", "tasks", "disk MiB", "compared MiB")
COLOURS = {"steady": "#2a7f62", "restarted": "#8a8f98"}


def main() -> None:
    """Write the picture beside the figures."""
    measured = json.loads((HERE / "soak.json").read_text())
    figure = Figure(figsize=(7, 8), layout="constrained")
    rows = figure.subplots(len(ROWS), sharex=True)
    for axes, what in zip(rows, ROWS, strict=True):
        for server, colour in reversed(COLOURS.items()):
            columns = measured[server]
            axes.plot(columns["seconds"], columns[what], color=colour, linewidth=1, label=f"{server} server")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(what, fontsize=8)
        axes.grid(visible=True, alpha=0.3)
    rows[0].set_title(measured["machine"], fontsize=6)
    rows[0].legend(fontsize=8, loc="lower right")
    rows[-1].set_xlabel("seconds")
    figure.savefig(HERE / "soak.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
