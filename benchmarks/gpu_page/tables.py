"""The tables of the page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from benchmarks.gpu_page.folder import Folder, Part
from benchmarks.gpu_page.goals import GOALS, Goal, in_goal
from benchmarks.gpu_page.measured import Group, Shape, Timing, by_shape, ceilings, share
from benchmarks.gpu_page.names import NORMS, OPS, STEPS, percent, times
from benchmarks.harness.interleaved import Ratio
from benchmarks.study.table import NONE, Table


def goals_table(folder: Folder) -> Table:
    def bound(goal: Goal) -> str:
        number = f"{100 * goal.bound:.0f}%" if goal.least else f"{goal.bound:.2f}"
        return f"at {'least' if goal.least else 'most'} {number}"

    rows = []
    for judged in (goal.judge(folder) for goal in GOALS):
        figure = (percent if judged.goal.least else times)(judged.figure)
        rows.append([judged.goal.words, bound(judged.goal), figure, judged.place or NONE, judged.verdict])
    return Table(["goal", "bound", "figure", "worst at", ""], rows)


def clone_table(folder: Folder) -> Table:
    """GB/s of a clone, and of an addition, by shape."""
    clones, additions = (ceilings(folder.groups("clone"), contender) for contender in ("clone", "add"))
    return Table(
        ["[tokens, D]", "clone, GB/s", "addition, GB/s"],
        [[str(shape), _rate(clone), _rate(additions.get(shape))] for shape, clone in clones.items()],
    )


def _rate(timing: Timing | None) -> str:
    if timing is None:
        return NONE
    rates = [timing.info["bytes"] / seconds / 1e9 for seconds in (timing.median, timing.q3, timing.q1)]
    return "{:.0f}<br>{:.0f} to {:.0f}".format(*rates)


def constrained_table(folder: Folder) -> Table:
    """The norm with the constraint at each shape: its share of a clone, and what it adds to the norm without it."""
    clones = ceilings(folder.groups("clone"))
    rows = []
    for shape, passes in by_shape(folder.groups("rms_norm_penalty")).items():
        shares = [_share_of("ours_constrained", passes, which, clones.get(shape)) for which in ("forward", "backward")]
        rows.append([str(shape), *map(percent, shares), times(_over("ours_constrained", "ours", passes))])
    return Table(["[tokens, D]", "forward, of a clone", "backward, of a clone", "over the norm without it"], rows)


def rivals_table(folder: Folder) -> Table:
    """Time of the norm with the constraint over that of every other norm, both passes, at the shapes of the goals."""
    all_shapes = by_shape(folder.groups("rms_norm_penalty"))
    shapes = {shape: passes for shape, passes in all_shapes.items() if in_goal(shape)} or all_shapes
    rivals = [name for name in NORMS if any(name in passes.get("both", {}) for passes in shapes.values())]
    return Table(
        ["time of the norm with the constraint over", *map(str, shapes)],
        [
            [NORMS[name], *(times(_over("ours_constrained", name, passes)) for passes in shapes.values())]
            for name in rivals
            if name != "ours_constrained"
        ],
    )


def contenders_table(kind: str, names: dict[str, str], shape: Shape, passes: dict[str, Group], clone: Timing | None):
    """All contenders at one shape: shares of a clone, and the first one's time over theirs."""
    first = next(iter(names))
    rows = []
    for name, words in names.items():
        if any(name in group for group in passes.values()):
            shares = [_share_of(name, passes, which, clone) for which in ("forward", "backward")]
            ratio = NONE if name == first else times(_over(first, name, passes))
            rows.append([words, *map(percent, shares), ratio])
    return Table([f"{kind}, {shape}", "forward, of a clone", "backward, of a clone", "time of the first over it"], rows)


def norm_tables(folder: Folder) -> Iterator[Table]:
    clones = ceilings(folder.groups("clone"))
    for shape, passes in by_shape(folder.groups("rms_norm_penalty")).items():
        yield contenders_table("norm", NORMS, shape, passes, clones.get(shape))


def op_tables(folder: Folder) -> Iterator[Table]:
    clones, groups = ceilings(folder.groups("clone")), folder.groups("projection_penalty")
    for directions in sorted({int(name.split()[1].rpartition("-k")[2]) for name in groups}):
        kind = f"the op, {directions} direction{'s' if directions > 1 else ''}"
        for shape, passes in by_shape(groups, directions).items():
            yield contenders_table(kind, OPS, shape, passes, clones.get(shape))


def _share_of(name: str, passes: dict[str, Group], which: str, clone: Timing | None) -> Ratio | None:
    timing = passes.get(which, {}).get(name)
    return share(timing, clone) if timing and clone else None


def _over(name: str, other: str, passes: dict[str, Group]) -> Ratio | None:
    both = passes.get("both", {})
    return both[name].over(other) if name in both and other in both else None


def steps_table(part: Part) -> Table:
    """Each training over its plain step."""
    groups = {name.removeprefix("training step "): group for name, group in part.groups.items() if "plain" in group}
    shown = [name for name in STEPS if any(name in group for group in groups.values())]
    rows = []
    for case, group in groups.items():
        cells = [times(group[name].over("plain")) if name in group else NONE for name in shown]
        rows.append([case, f"{group['plain'].info['tokens_per_second']:.0f}", *cells])
    return Table(["time over the plain step's", "tokens/s, plain", *(STEPS[name] for name in shown)], rows)


def memory_table(part: Part) -> Table | None:
    """Most GPU memory of each training, over the plain step's."""
    groups = {name.removeprefix("training step "): group for name, group in part.groups.items() if "plain" in group}
    rows = []
    for case, group in groups.items():
        most = {name: timing.info["peak_memory_bytes"] for name, timing in group.items() if _has_memory(timing)}
        if "plain" in most:
            cells = [f"{most[name] / most['plain']:.3f}" if name in most else NONE for name in STEPS]
            rows.append([case, f"{most['plain'] / 2**30:.1f}", *cells])
    header = ["most memory over the plain step's", "GiB, plain", *STEPS.values()]
    return Table(header, rows) if rows else None


def _has_memory(timing: Timing) -> bool:
    return "peak_memory_bytes" in timing.info


def tuning_table(part: Part) -> Table:
    """The best tile that was found beside the table's, at each size."""
    rows = []
    for found in part.results.get("measured", []):
        ratio = found["listed_over_best"]
        rows.append(
            [
                f"{found['kernel']}, D = {found['size']}",
                _tile(found["listed"]),
                _tile(found["best"]),
                times(Ratio(**ratio)) if ratio else "the table's does not fit",
            ]
        )
    return Table(["kernel", "in the table", "best", "time in the table over best"], rows)


def _tile(choice: list[int]) -> str:
    rows, threads = choice
    return f"{rows} row{'s' if rows > 1 else ''}, {threads} threads"


def tests_table(folder: Folder) -> Table:
    """Outcomes of the tests marked gpu, and of the suites' own checks."""
    rows = []
    for part in folder.parts.values():
        if part.cases:
            counts = [sum(case.outcome == kind for case in part.cases) for kind in ("passed", "failed", "skipped")]
            rows.append([part.name, *map(str, counts)])
    return Table(["part", "passed", "failed", "skipped"], rows)


def missing_table(folder: Folder) -> Table | None:
    """Parts that are not whole, contenders and tests that were left out, and why."""
    rows = [
        [f"part `{part.name}`", escape(part.trouble, quote=False)] for part in folder.parts.values() if part.trouble
    ]
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for part in folder.parts.values():
        for case in part.cases:
            if case.outcome != "passed":
                name = case.name.rpartition("::")[2]
                subject = name.rpartition("-")[2].rstrip("]") if part.name != "tests" and "[" in name else name
                reasons.setdefault((part.name, f"{case.outcome}: {case.reason}"), {})[subject] = None
    rows += [
        [f"`{part}`: {', '.join(names)}", escape(reason, quote=False)] for (part, reason), names in reasons.items()
    ]
    return Table(["", "why"], rows) if rows else None
