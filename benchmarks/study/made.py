"""How runs were made, in words: commands, machines, versions, commits, hours and seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def how_made(runs: Sequence[dict], commands: Sequence[str], packages: Sequence[str] = ()) -> str:
    """The commands that make the runs again, and what is in their files; ``packages`` beyond those of every study."""
    made = [run["made"] for run in runs]
    machines = Counter(entry["machine"] for entry in made)
    packages = ("python", "torch", "transformers", "peft", *packages)
    versions = {package: " and ".join(sorted({entry[package] for entry in made})) for package in packages}
    commits = Counter(str(entry["commit"]) for entry in made)
    hours = sum(run["seconds"] for run in runs) / 3600
    trained = sum(run["train_seconds"] for run in runs) / 3600
    lines = "\n".join(commands)
    return f"""\
```bash
{lines}
```

- Machines: {_counted(machines)}.
- Versions: {", ".join(f"{package} {number}" for package, number in versions.items())}.
- Commits: {_counted(commits)}.
- Hours: {hours:.1f}, of which {trained:.1f} were training, summed over runs; several may have run at once.
- Seeds: {", ".join(map(str, sorted({run["seed"] for run in runs})))}."""


def when_made(runs: Sequence[dict]) -> str:
    """The day on which runs were made, or the first and the last."""
    dates = sorted(run["made"]["date"][:10] for run in runs)
    return f"on {dates[0]}" if dates[0] == dates[-1] else f"from {dates[0]} to {dates[-1]}"


def _counted(found: Counter[str]) -> str:
    return "; ".join(f"{name} ({n} {'run' if n == 1 else 'runs'})" for name, n in found.most_common())
