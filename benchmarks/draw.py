"""Draws result files and prints their tables: ``python -m benchmarks.draw RESULTS.json... --out FOLDER``.

Bars for times, a roofline for kernels, and Markdown tables, each with its machine.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

Group = list[dict]


def read_groups(results: dict) -> dict[str, Group]:
    """The benchmarks of one result file by group, in the order that they ran in."""
    groups: dict[str, Group] = {}
    for benchmark in results["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark)
    return groups


def describe_run(results: dict) -> str:
    """Machine, versions, date, commit and command, in one line."""
    machine, run, commit = results["machine_info"]["procon"], results["run"], results["commit_info"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    state = f"{commit['id'][:10]}{' with changes' if commit.get('dirty') else ''}"
    return (
        f"{machine['device']}, {machine['threads']} CPU threads, copy {run['copy_bandwidth'] / 1e9:.0f} GB/s; "
        f"{versions}; {results['datetime'][:10]}; commit {state}; `{run['command']}`"
    )


def format_seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def format_ratio(benchmark: dict) -> str:
    info = benchmark["extra_info"]
    if info["contender"] == info["baseline"]:
        return "1"
    ratio = info["ratios"][info["baseline"]]
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


#: Further columns, by the field of ``extra_info`` that they come from.
COLUMNS = {
    "gigabytes_per_second": ("GB/s", "{:.0f}"),
    "percent_of_copy": ("% of copy", "{:.0f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "peak_memory_bytes": ("peak bytes", "{:.4g}"),
    "microseconds_per_call": ("us per call", "{:.1f}"),
    "microseconds_per_block": ("us added per block", "{:.1f}"),
    "bytes_per_constrained_token": ("bytes per constrained token", "{:.1f}"),
}


def markdown_table(name: str, group: Group) -> str:
    """One row per contender: median time, paired ratio to the baseline with its 95% interval, and further columns."""
    fields = [field for field in COLUMNS if any(field in benchmark["extra_info"] for benchmark in group)]
    baseline = group[0]["extra_info"]["baseline"]
    header = [name, "median", f"times {baseline} [95%]", *(COLUMNS[field][0] for field in fields)]
    rows = [header, ["---"] * len(header)]
    for benchmark in group:
        info = benchmark["extra_info"]
        more = [COLUMNS[field][1].format(info[field]) if field in info else "" for field in fields]
        rows.append([info["contender"], format_seconds(benchmark["stats"]["median"]), format_ratio(benchmark), *more])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_bars(axes: Axes, name: str, group: Group) -> None:
    """Median times with their quartiles."""
    labels = [benchmark["extra_info"]["contender"] for benchmark in group]
    stats = [benchmark["stats"] for benchmark in group]
    medians = [1e3 * s["median"] for s in stats]
    spread = [
        [1e3 * max(s["median"] - s["q1"], 0) for s in stats],
        [1e3 * max(s["q3"] - s["median"], 0) for s in stats],
    ]
    colours = ["tab:gray" if b["extra_info"]["contender"] == b["extra_info"]["baseline"] else "tab:blue" for b in group]
    axes.barh(labels, medians, xerr=spread, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("ms (median, quartiles)")
    axes.set_title(name, fontsize="small")


def draw_roofline(axes: Axes, group: Group, copy_bandwidth: float) -> None:
    """Operations per second over operations per byte, under the bandwidth of a copy."""
    intensities = []
    for benchmark in group:
        info = benchmark["extra_info"]
        intensity = info["flops"] / info["bytes"]
        intensities.append(intensity)
        axes.loglog(intensity, info["flops"] / benchmark["stats"]["median"], "o", label=info["contender"])
    edges = [min(intensities) / 2, max(intensities) * 2]
    axes.loglog(edges, [edge * copy_bandwidth for edge in edges], "k--", label="copy")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("operations per second")
    axes.legend(fontsize="x-small")


def draw_group(name: str, group: Group, copy_bandwidth: float, folder: Path) -> Path:
    """Write ``<group>.png``: bars, and beside them the roofline of what does operations on bytes."""
    kernels = all(benchmark["extra_info"].get("flops") for benchmark in group)
    figure, axes = pyplot.subplots(1, 2 if kernels else 1, figsize=(11 if kernels else 6, 1.2 + 0.4 * len(group)))
    if kernels:
        draw_roofline(axes[1], group, copy_bandwidth)
    draw_bars(axes[0] if kernels else axes, name, group)
    figure.tight_layout()
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draw", description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files that --benchmark-json wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.results:
        results = json.loads(file.read_text())
        print(f"{describe_run(results)}\n")
        for name, group in read_groups(results).items():
            draw_group(name, group, results["run"]["copy_bandwidth"], options.out)
            print(f"{markdown_table(name, group)}\n")


if __name__ == "__main__":
    main()
