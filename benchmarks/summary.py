"""Make the summary of the benchmarks' JSON files: a Markdown table and two pictures.

    python benchmarks/all.py                                   runs all and then this
    python benchmarks/summary.py benchmarks/results --images benchmarks/images

Pictures: speed.png has the ratio of minicnn to PyTorch's best mode for every case, and roofline.png
the ops between the processor's two limits, arithmetic and memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contest import OURS, totals
from harness import best

from minicnn.plots.theme import MEDIUM, SMALL, THEMES, empty_figure, graph

# One script a line, in the order of the table, with its name there.
FAMILIES = {
    "step": "networks",
    "conv2d": "convolution",
    "conv_transpose2d": "transposed convolution",
    "linear": "linear",
    "pool": "pooling",
    "norm": "normalisation",
    "activations": "activations",
    "softmax_loss": "softmax and losses",
    "im2col": "im2col",
    "optim": "optimisers",
}
MARKERS = {"conv2d": "o", "conv_transpose2d": "^", "linear": "s", "pool": "D", "norm": "v"}
PEER = "PyTorch"


class Row(NamedTuple):
    """One case of one script."""

    family: str  # the script
    case: str
    passes: str
    ours: str  # our fastest version
    seconds: float
    peer: str  # PyTorch's fastest mode
    peer_seconds: float
    flop: float
    traffic: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds


def read(folder: Path) -> dict[str, Any]:
    """Return the reports that are in the folder, by script, in the order of FAMILIES."""
    reports = {}
    for family in FAMILIES:
        path = folder / f"{family}.json"
        if path.is_file():
            reports[family] = json.loads(path.read_text())
    if not reports:
        raise SystemExit(f"summary: {folder}: expected JSON files of the benchmarks, found none")
    return reports


def rows(reports: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a row for every case that ran beside PyTorch; networks have one a pass."""
    for family, report in reports.items():
        for case, figures in report["cases"].items():
            of_pass = totals(figures["seconds"])
            passes = ["total"] if "total" in of_pass else list(of_pass)
            for p in passes:
                times = {c: s for c, s in of_pass[p].items() if "channels-last" not in c}
                ours, peer = best(times, OURS), best(times, PEER)
                if family == "step":
                    ours = OURS  # as it comes
                if ours is not None and peer is not None:
                    yield Row(
                        family,
                        case,
                        "" if p == "total" else p,
                        ours,
                        times[ours],
                        peer,
                        times[peer],
                        sum(figures["flop"].values()),
                        sum(figures["bytes"].values()),
                    )


def markdown(reports: Mapping[str, Any]) -> str:
    """Return the table of all cases; ops forward and backward together."""
    first = next(iter(reports.values()))
    lines = [
        f"{first['machine']}, {first['threads']} threads; "
        f"{first['fma_peak_gflops']:.0f} GFLOP/s of FMA, {first['copy_gb_per_s']:.0f} GB/s copied; "
        + ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        "",
        "| | case | minicnn, ms | version | PyTorch's best, ms | mode | ratio | of peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    last = ""
    for row in rows(reports):
        case = f"{row.case}, {row.passes}" if row.passes else row.case
        peak = reports[row.family]["fma_peak_gflops"] * 1e9
        share = f"{100 * row.flop / row.seconds / peak:.0f} %" if row.flop else ""
        family = FAMILIES[row.family] if row.family != last else ""
        last = row.family
        version = row.ours.removeprefix(OURS).strip(" ,") or "as it comes"
        cells = (
            family, case, f"{1e3 * row.seconds:.3g}", version, f"{1e3 * row.peer_seconds:.3g}",
            row.peer.removeprefix(PEER).strip(), f"{row.ratio:.2f}", share,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "An op's time is that of its forward and backward pass. The share of the FMA peak counts a "
        "direct convolution's operations: Winograd's needs fewer, and may pass 100 %.",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures


def speed(reports: Mapping[str, Any], theme: str) -> Any:
    """Draw every case's ratio to PyTorch on a logarithmic axis; left of 1 minicnn is faster."""
    colours = THEMES[theme]
    listed = list(rows(reports))
    figure = empty_figure(8, 1.2 + 0.185 * len(listed), colours)
    ax = figure.subplots()
    title = "Time to PyTorch's best mode: left of 1, minicnn is faster"
    graph(ax, title, "minicnn / PyTorch", "", colours)
    for y, row in enumerate(listed):
        colour = colours.blue if row.ratio <= 1 else colours.orange
        ax.plot([1, row.ratio], [y, y], color=colour, linewidth=1.2, zorder=2)
        # The shape says it too: a filled circle is faster, an open square slower.
        faster = row.ratio <= 1
        ax.plot(
            row.ratio, y, "o" if faster else "s", color=colour, markersize=5,
            markerfacecolor=colour if faster else colours.paper,
        )  # fmt: skip
        left, at = row.ratio <= 1, (row.ratio, y)
        ax.annotate(
            f"{row.ratio:.2f}", at, (-6 if left else 6, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=SMALL - 1, color=colours.ink,
        )  # fmt: skip
        if not y or row.family != listed[y - 1].family:
            ax.axhline(y - 0.5, color=colours.faint, linewidth=0.8)
            ax.annotate(
                FAMILIES[row.family], (0.008, y), xycoords=("axes fraction", "data"),
                va="center", fontsize=SMALL, fontstyle="italic", color=colours.ink,
            )  # fmt: skip
    names = [f"{row.case}, {row.passes}" if row.passes else row.case for row in listed]
    ax.set_yticks(range(len(names)), names)
    ax.grid(visible=False, axis="y")
    ax.axvline(1, color=colours.ink, linewidth=0.9)
    ax.set_xscale("log")
    low, high = (f([row.ratio for row in listed] + [1]) for f in (min, max))
    ax.set_xlim(low / 1.7, high * 1.7)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low / 1.7 < t < high * 1.7]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(len(listed) - 0.4, -0.6)
    return figure


def roofline(reports: Mapping[str, Any], theme: str) -> Any:
    """Draw the ops between two limits: arithmetic, and memory times operations a byte."""
    colours = THEMES[theme]
    figure = empty_figure(8, 5, colours)
    ax = figure.subplots()
    title = "Roofline: how near the ops come to what the processor allows (forward and backward)"
    graph(ax, title, "operations a byte of memory, at best", "GFLOP/s", colours)
    listed = [row for row in rows(reports) if row.flop and row.family in MARKERS]
    if not listed:
        raise SystemExit("summary: roofline: expected results of conv2d, linear, pool or norm")
    report = reports[listed[0].family]
    peak, copied = report["fma_peak_gflops"], report["copy_gb_per_s"]
    intensities = [row.flop / row.traffic for row in listed]
    low, high = min(intensities) / 2, max(*intensities, 4 * peak / copied) * 2
    ridge = peak / copied
    ax.plot([low, ridge, high], [low * copied, peak, peak], color=colours.ink, linewidth=1.2)
    note = {"fontsize": SMALL, "color": colours.ink}
    ax.annotate(f"{peak:.0f} GFLOP/s of fused multiply-adds", (ridge, peak), (0, 6),
                textcoords="offset points", ha="right", **note)  # fmt: skip
    middle = (low * ridge) ** 0.5
    ax.annotate(f"{copied:.0f} GB/s of a copy", (middle, middle * copied), (-8, 4),
                textcoords="offset points", ha="right", **note)  # fmt: skip
    for row, x in zip(listed, intensities):
        marker = MARKERS[row.family]
        theirs, ours = (row.flop / s / 1e9 for s in (row.peer_seconds, row.seconds))
        ax.plot([x, x], [theirs, ours], color=colours.faint, linewidth=1, zorder=1)
        ax.plot(
            x, theirs, marker, color=colours.orange, markerfacecolor=colours.paper, markersize=6
        )
        ax.plot(x, ours, marker, color=colours.blue, markersize=6)
    handles = [
        ax.plot([], [], marker, color=colours.ink, label=FAMILIES[family], linestyle="none")[0]
        for family, marker in MARKERS.items()
        if any(row.family == family for row in listed)
    ]
    handles += [
        ax.plot([], [], "o", color=colours.blue, label="minicnn")[0],
        ax.plot([], [], "o", color=colours.orange, markerfacecolor=colours.paper,
                label="PyTorch's best mode")[0],
    ]  # fmt: skip
    ax.legend(handles=handles, loc="lower right", fontsize=SMALL, labelcolor=colours.ink,
              facecolor=colours.paper, edgecolor=colours.faint)  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    winograd = any("winograd" in row.ours for row in listed)
    if winograd:
        ax.set_xlabel(
            "operations a byte of memory, at best "
            "(direct convolution's: Winograd's needs fewer and may lie above the roof)",
            color=colours.ink, fontsize=MEDIUM,
        )  # fmt: skip
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument(
        "folder", type=Path, nargs="?", default=here / "results", help="of the JSON files"
    )
    parser.add_argument("--images", type=Path, default=here / "images", help="where pictures go")
    parser.add_argument("--theme", choices=THEMES, default="light")
    args = parser.parse_args(argv)
    reports = read(args.folder)
    print(markdown(reports))
    args.images.mkdir(parents=True, exist_ok=True)
    for name, draw in (("speed", speed), ("roofline", roofline)):
        figure = draw(reports, args.theme)
        figure.savefig(args.images / f"{name}.png", dpi=100, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
