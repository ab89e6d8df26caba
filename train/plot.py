"""moonkit plot: the curves of one or more runs, from their logs.

moonkit plot runs/nano                             runs/nano/curves.png
moonkit plot runs/muon runs/adamw --out both.png   one colour per run
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass(frozen=True)
class Plot:
    """Loss per group, learning rate, largest attention logit, gradient norm and expert load against tokens."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """The picture. Left out: curves.png in the first run's folder."""
    smooth: int = 25
    """Steps over which losses are averaged."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("name at least one run folder")
        if self.smooth < 1:
            raise ValueError(f"smooth must be at least 1, got {self.smooth}")


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Records of all steps. Raises ValueError for a folder without any."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no log.jsonl")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number} is cut short; continuing the run repairs it") from None
        if "event" not in record:
            records.append(record)
    if not records:
        raise ValueError(f"{path} holds no steps yet")
    return records


def smoothed(values: Sequence[float], weights: Sequence[float], window: int) -> list[float]:
    """Weighted mean over the last `window` values, at each place."""
    out = []
    for end in range(1, len(values) + 1):
        start = max(0, end - window)
        total = sum(weights[start:end])
        out.append(sum(v * w for v, w in zip(values[start:end], weights[start:end], strict=True)) / total)
    return out


def draw(runs: Sequence[Path], out: Path, smooth: int = 25) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    logs = {folder: read_steps(folder) for folder in runs}
    groups = list(dict.fromkeys(name for log in logs.values() for record in log for name in record["losses"]))
    panels = ["loss", *(f"loss: {group}" for group in groups)] if len(groups) > 1 else ["loss"]
    panels += ["learning rate", "largest attention logit", "gradient norm", "busiest expert over the mean"]
    keys = {"learning rate": "lr", "largest attention logit": "max_logit", "gradient norm": "grad_norm"}
    keys["busiest expert over the mean"] = "load"
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, (folder, log) in enumerate(logs.items()):
            colour = colours[number % len(colours)]
            if panel.startswith("loss"):
                group = panel.removeprefix("loss: ") if panel != "loss" else None
                points = [
                    (record["tokens"], record["loss"] if group is None else record["losses"][group], record["targets"])
                    for record in log
                    if group is None or group in record["losses"]
                ]
                if not points:
                    continue
                tokens, values, weights = (list(column) for column in zip(*points, strict=True))
                axis.plot(tokens, values, color=colour, alpha=0.2, linewidth=0.6)
                values = smoothed(values, weights if group is None else [1.0] * len(values), smooth)
            else:
                tokens, values = [r["tokens"] for r in log], [r[keys[panel]] for r in log]
            axis.plot(tokens, values, color=colour, linewidth=1.4, label=_name(folder, runs))
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.25)
        axis.margins(x=0.01)
        if panel.startswith(("loss", "gradient")) and axis.has_data():
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            # within a decade or two, its powers alone would label one or two lines
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout()
    if len(logs) > 1:
        figure.subplots_adjust(top=1 - 0.35 / rows / 3.2 * 2)
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _name(folder: Path, runs: Sequence[Path]) -> str:
    """The folder's own name, or its path where two share a name."""
    return folder.name if sum(other.name == folder.name for other in runs) == 1 else str(folder)


def main() -> None:
    """The verb."""
    options = tyro.cli(Plot, prog="moonkit plot")
    out = options.out or options.runs[0] / "curves.png"
    draw(options.runs, out, options.smooth)
    print(out)


if __name__ == "__main__":
    main()
