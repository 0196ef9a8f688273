"""A bar chart of every op: how many times longer each provider takes than ours."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

from benchmarks.harness import Row

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#f0e442", "#000000")


def plot(rows: Sequence[Row], machine: dict, stem: pathlib.Path) -> list[pathlib.Path]:
    """Write <stem>-<op>.png and .svg for each op; bars above 1 are slower than flamingo_kernels. Returns the paths."""
    return [path for op in _ordered(row.op for row in rows) for path in _plot_op(op, rows, machine, stem)]


def _plot_op(op: str, rows: Sequence[Row], machine: dict, stem: pathlib.Path) -> list[pathlib.Path]:
    rows = [row for row in rows if row.op == op and row.status == "ok"]
    passes, dtypes = (_ordered(getattr(row, name) for row in rows) for name in ("pass_", "dtype"))
    if not any(row.ours for row in rows):
        return []
    rivals = _ordered(row.provider for row in rows if not row.ours)
    figure, axes = plt.subplots(
        len(passes), len(dtypes), figsize=(1.5 + 6.2 * len(dtypes), 1.2 + 3.1 * len(passes)), squeeze=False, sharey=True
    )
    for line, pass_ in zip(axes, passes, strict=True):
        for axis, dtype in zip(line, dtypes, strict=True):
            _bars(axis, [row for row in rows if (row.pass_, row.dtype) == (pass_, dtype)], rivals)
            axis.set_title(f"{pass_}, {dtype}", fontsize=10)
        line[0].set_ylabel("time / ours (log scale)")
    handles = {h.get_label(): h for axis in axes.flat for h in axis.containers}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, fontsize=9)
    about = f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    figure.suptitle(f"{op}: times slower than flamingo_kernels; below each shape, the best rival\n{about}", fontsize=11)
    figure.tight_layout(rect=(0, 0.04 + 0.025 * -(-len(rivals) // 4), 1, 1))
    paths = [stem.with_name(f"{stem.name}-{op}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return paths


def _bars(axis: plt.Axes, rows: list[Row], rivals: list[str]) -> None:
    ours = {row.shape: row.p50_ms for row in reversed(rows) if row.ours}  # of two, the first: what runs by itself
    shapes = [shape for shape in _ordered(row.shape for row in rows) if shape in ours]
    ratios = {(row.shape, row.provider): row.p50_ms / ours[row.shape] for row in rows if row.shape in ours}
    width = 0.84 / max(len(rivals), 1)
    for i, rival in enumerate(rivals):
        points = [(x, ratios[shape, rival]) for x, shape in enumerate(shapes) if (shape, rival) in ratios]
        if points:
            places = [x + (i - (len(rivals) - 1) / 2) * width for x, _ in points]
            heights = [ratio - 1 for _, ratio in points]
            axis.bar(places, heights, width, bottom=1, label=rival, color=_COLORS[i % len(_COLORS)])
    axis.axhline(1, color="black", linewidth=1)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_Times())
    axis.yaxis.set_minor_formatter(_Times())
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    labels = [f"{shape}\nbest {_best(ratios, shape, rivals)}" for shape in shapes]
    axis.set_xticks(range(len(shapes)), labels, fontsize=8)


class _Times(LogFormatter):
    """Leaves those ticks without a label that would crowd the axis."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        return super().__call__(value, pos) and f"{value:g}×"


def _best(ratios: dict[tuple[str, str], float], shape: str, rivals: list[str]) -> str:
    of_rivals = [ratio for (s, provider), ratio in ratios.items() if s == shape and provider in rivals]
    return f"{min(of_rivals):.1f}×" if of_rivals else "none"


def _ordered(values) -> list:
    return list(dict.fromkeys(values))
