"""Rows as a table on screen, as a line per case, and as JSON."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby

from benchmarks.harness import Row

_COLUMNS = (
    "provider",
    "ms",
    "p20..p80",
    "ours is",
    "GPU ms",
    "ours is",
    "% of limit",
    "peak MiB",
    "saved MiB",
    "setup ms",
    "err/budget",
    "note",
)

LEGEND = """\
ms          median per call over interleaved rounds, with p20..p80
ours is     how many times faster flamingo_kernels is than this row; below 1x it is slower
GPU ms      the same without the host: calls in a CUDA graph, medians of interleaved replays
% of limit  time that the nearer limit of this machine asks for (matmul peak, or bandwidth of a copy as large), over ms
peak MiB    most memory allocated at once during the call; inputs do not count, results do
saved MiB   kept for backward: besides the inputs + of the inputs
setup ms    mask, block mask or intervals: built once per batch, not in ms
err/budget  largest error against fp64 over 2·err(eager) + c·eps·max|ref|; above 1 is WRONG and gets no time
note        the layout of the tensors a provider was given; the backend of ours; the case that was checked, if not this
slow        a call would take so long that it is not timed, going by a small case"""


def table(rows: Sequence[Row]) -> str:
    """The rows of one case, a block per pass."""
    lines = [f"{rows[0].op}  {rows[0].description}  {rows[0].dtype}"]
    for pass_, group in groupby(rows, key=lambda row: row.pass_):
        group = list(group)
        ours = next((row for row in group if row.ours), None)
        lines += ["", *_aligned([(pass_, *_COLUMNS[1:])] + [_cells(row, ours) for row in _fastest_first(group)])]
    return "\n".join(lines)


def _fastest_first(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.p50_ms is None, row.p50_ms or 0))


def _cells(row: Row, ours: Row | None) -> tuple[str, ...]:
    name = f"* {row.provider}" if row.ours else f"  {row.provider}"
    if row.status != "ok":
        return (name, f"{row.status}: {row.reason}")
    saved = "" if row.saved_bytes is None else f"{_mib(row.saved_bytes)} + {_mib(row.saved_input_bytes)}"
    return (
        name,
        f"{row.p50_ms:.3f}",
        f"{row.p20_ms:.3f}..{row.p80_ms:.3f}",
        _times(row, ours, "p50_ms"),
        "" if row.device_ms is None else f"{row.device_ms:.4f}",
        _times(row, ours, "device_ms"),
        f"{100 * row.limit_fraction:.1f} {row.limit}",
        _mib(row.peak_bytes),
        saved,
        "" if row.setup_ms is None else f"{row.setup_ms:.2f}",
        f"{row.error_over_budget:.2f}",
        row.note,
    )


def _times(row: Row, ours: Row | None, figure: str) -> str:
    """How many times as long as ours it takes, by one of the two figures."""
    if row.ours or ours is None or None in (getattr(row, figure), getattr(ours, figure)):
        return ""
    return f"{getattr(row, figure) / getattr(ours, figure):.2f}x"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}" if size >= 2**20 else f"{size / 2**20:.3f}"


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Numbers to the right, the first and the last column to the left; two cells are a name and a sentence."""
    full = [cells for cells in lines if len(cells) == len(_COLUMNS)]
    widths = [max(len(cells[i]) for cells in full) for i in range(len(_COLUMNS))]
    widths[0] = max(len(cells[0]) for cells in lines)
    return [
        "  ".join(
            [
                cells[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(cells[1:-1], widths[1:-1], strict=True)),
                cells[-1],
            ]
        ).rstrip()
        if len(cells) == len(_COLUMNS)
        else f"{cells[0].ljust(widths[0])}  {cells[1]}"
        for cells in lines
    ]


def best_rival(rows: Iterable[Row], figure: str = "p50_ms") -> Row | None:
    """The fastest right row that is not ours, by `figure`."""
    right = (row for row in rows if not row.ours and row.status == "ok" and getattr(row, figure) is not None)
    return min(right, key=lambda row: getattr(row, figure), default=None)


def summary(rows: Sequence[Row]) -> list[str]:
    """A line per case: ours against the best rival, forward and forward+backward."""
    lines = []
    for _, group in groupby(rows, key=_case):
        group = list(group)
        parts = []
        for pass_, of_pass in groupby(group, key=lambda row: row.pass_):
            of_pass = list(of_pass)
            ours, rival = next(row for row in of_pass if row.ours), best_rival(of_pass)
            if ours.status != "ok":
                parts.append(f"{pass_} {ours.status}")
            elif rival is None:
                missing = (
                    "the rivals are too slow to time" if any(r.status == "slow" for r in of_pass) else "no rival runs"
                )
                parts.append(f"{pass_} {ours.p50_ms:.3f} ms, {missing}")
            else:
                parts.append(f"{pass_} {rival.p50_ms / ours.p50_ms:.2f}x the best rival ({rival.provider})")
                on_gpu = best_rival(of_pass, "device_ms")
                if on_gpu is not None and ours.device_ms is not None:
                    parts[-1] += f", on the GPU {on_gpu.device_ms / ours.device_ms:.2f}x ({on_gpu.provider})"
        lines.append(f"{group[0].op} {group[0].shape} {group[0].dtype}: {'; '.join(parts)}")
    return lines


def _case(row: Row) -> tuple[str, str, str]:
    return row.op, row.shape, row.dtype


def save(path: pathlib.Path, machine: dict, limits: dict, rows: Sequence[Row]) -> None:
    """One JSON file: what the machine is, its measured limits, every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "limits": limits, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(path: pathlib.Path) -> tuple[dict, dict, list[Row]]:
    """What `save` wrote: machine, limits, rows."""
    content = json.loads(path.read_text())
    return content["machine"], content["limits"], [Row(**row) for row in content["rows"]]
