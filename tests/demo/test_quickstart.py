"""The quickstart: its parts on the real model, and the whole on a tiny one."""

import logging
from pathlib import Path

import pytest

from procon.cli import main
from procon.demo import quickstart as module
from procon.models import load_model, weights_hash
from procon.report import read_runs


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whole_quickstart_on_a_tiny_model(full, place, few_prompts, monkeypatch, capfd):
    """In full with all that can be measured, otherwise with what one screen holds."""
    folder, output = Path("model"), Path("procon-quickstart")
    tiny = module.Size(train=16, batch=8, test=4, prompts=2)
    more = {"watched": 2, "drift_pairs": 2, "every": 2}
    monkeypatch.setattr(module, "FULL" if full else "QUICK", tiny._replace(**more) if full else tiny)
    monkeypatch.setitem(module.RECIPE, "logging_steps", 1)
    monkeypatch.setenv("COLUMNS", "80")
    capfd.readouterr()
    with pytest.warns(UserWarning, match="refuses 0% of"):
        runs = module.quickstart(str(folder), output, 3, full=full, control=full)
    logging.getLogger("transformers").setLevel(logging.WARNING)

    labels = ["start", "plain", "ProCon", *["tokens", "random"] * full]
    assert [run.label for run in runs] == labels
    assert [run.mean_cosine is not None for run in runs] == [False, *[full] * (len(runs) - 1)]
    alphas = [{row["procon/alpha"] for row in run.history if "procon/alpha" in row} for run in runs[1:]]
    assert max(alphas[1], default=0) > 0
    assert max(alphas[0], default=0) == 0
    assert ("procon/task" in {name for row in runs[1].history for name in row}) == full
    written = {path.name for path in output.iterdir()}
    assert ("report.html" in written, "directions.safetensors" in written) == (True, full)
    paths = [output / name for name in ("start.json", "plain", "procon", "tokens", "random")]
    for path, run in zip(paths, runs, strict=False):
        (read,) = read_runs([path])
        assert (read.label, read.evaluation) == (run.label.lower(), run.evaluation)
        assert read.mean_cosine == run.mean_cosine
    printed = "".join(capfd.readouterr())
    for heading in ("malicious", "accuracy", *["cosine"] * full, "per step", "step 2 of 2: loss "):
        assert heading in printed
    assert not [sign for sign in ("{'", "it/s", "%|") if sign in printed]
    assert full or len(printed.splitlines()) <= 38
    # An adapter names its base, and both runs began from the same weights.
    for name in ("plain", "procon"):
        tuned, _ = load_model(output / name)
        assert weights_hash(tuned.unload()) == weights_hash(load_model(folder)[0])


def test_start_only(place, monkeypatch, capsys):
    """The demo model is taught to refuse; another one is taken as it is."""
    folder, output = Path("model"), Path("out")
    monkeypatch.setattr(module, "fetch_demo_model", lambda: folder)
    monkeypatch.setattr(module, "teach_refusal", lambda model: model)
    assert main(["quickstart", "--start_only", "--output_dir", str(output)]) == 0
    assert "Starting model: out/start\n" in capsys.readouterr().out
    assert [path.name for path in output.iterdir()] == ["start"]
    load_model(output / "start")
    assert module.make_start("model", "other") == "model"
    assert not Path("other").exists()
