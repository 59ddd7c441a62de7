"""What is planned can be run, and what is measured no choice has seen."""

import inspect
import re
from dataclasses import fields, replace

import pytest

from benchmarks.study.defences import DEFENCES
from benchmarks.study.fresh import FORMS, fresh_prompts
from benchmarks.study.jobs import find_job
from benchmarks.study.plan import PLANS, Size, load_budget
from benchmarks.study.trial import fine_tune, probes_in_file
from procon.chat import builtin_probe_pairs, builtin_prompts
from procon.errors import ProConError
from procon.settings import ProConSettings
from procon.training import ProConConfig

SIZE = Size(train=6, test=4, chosen_on=("arithmetic",))


@pytest.mark.parametrize("budget", sorted(file.stem for file in PLANS.glob("*.yaml")))
def test_every_method_is_one_that_its_defence_takes(budget, tmp_path):
    known = {field.name for field in fields(ProConConfig)} | {"beta"}
    for part in load_budget(budget).parts:
        assert budget == "preferences" or [find_job(job).name for job in part.jobs] == list(part.jobs)
        for method in part.methods:
            if not method.retired:
                taken = inspect.signature(DEFENCES[method.defence].trainer.__init__).parameters.keys()
                assert method.settings.keys() <= taken
                assert method.config.keys() <= known
                settings = probes_in_file({"procon_terms": "tokens", **method.config}, tmp_path)
                ProConConfig(str(tmp_path), **{name: settings[name] for name in settings if name != "beta"})


def test_a_longer_method_is_the_same_for_more_steps():
    budget = load_budget("hard")
    assert budget.method("plain_x4") == replace(budget.method("plain"), name="plain_x4", label="IFT, 4x", length=4.0)
    with pytest.raises(ProConError, match=r"^budget is 'tables': choose one of anchors, hard,"):
        load_budget("tables")


def test_some_of_the_built_in_probes(tmp_path):
    found = probes_in_file({"procon_probes": "builtin:8", "procon_probe_every": 2}, tmp_path)
    text = (tmp_path / "probes.jsonl").read_text()
    assert found == {"procon_probes": str(tmp_path / "probes.jsonl"), "procon_probe_every": 2}
    assert [line for line in text.splitlines() if builtin_probe_pairs().malicious[7] in line] == text.splitlines()[-1:]
    assert probes_in_file({"procon_probes": "builtin"}, tmp_path) == {"procon_probes": "builtin"}


def test_the_default_of_the_study_is_the_librarys():
    """In what the method is; lengths and rates of training are the study's own."""
    config = load_budget("hard").method("begun_3_four").config
    library = {f"procon_{field.name}": field.default for field in fields(ProConSettings)}
    own = config.keys() - {"procon_schedule"}
    assert {name: library[name] for name in own} == {name: config[name] for name in own}


def test_all_weights_are_trained(tiny_start):
    """In float32, and measured in the dtype of the start."""
    import torch

    start = replace(tiny_start, loading={"dtype": "bfloat16"})
    model, before = start.model(), start.model().state_dict()
    method = load_budget("hard").method("plain_full_0.0003")
    size = Size(train=16, test=1)
    found = fine_tune(model, start.tokenizer, method, start.directions, find_job("arithmetic"), 0, size)
    assert found["steps"] == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # Norms are ones, which steps so small leave at ones in bfloat16.
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "norm" not in name}


def test_held_out_runs_have_problems_that_no_choice_has_seen():
    for name in ("arithmetic", "arithmetic_poisoned_10", "identity"):
        job = find_job(name)
        seen, kept = (job.problems(14, 0)[part] for part in (slice(6, 10), slice(10, 14)))
        assert SIZE.problems(job, "validation") == seen
        assert SIZE.problems(job, "held_out") == kept
    job = find_job("swapped")
    assert SIZE.problems(job, "held_out") == SIZE.problems(job, "validation") == job.problems(10, 0)[6:]


def test_fresh_prompts_are_of_another_make():
    """No topic, no form and hardly a phrase is shared with the prompts that directions come from."""
    fresh = fresh_prompts()
    assert len({*fresh.malicious, *fresh.benign}) == 128
    known = builtin_prompts("extraction")
    assert not set(fresh.categories) & set(known.categories)

    def phrases(texts: tuple[str, ...], words: int = 4) -> set[tuple[str, ...]]:
        split = [re.findall(r"[a-z']+", text.lower()) for text in texts]
        return {tuple(row[start : start + words]) for row in split for start in range(len(row) - words + 1)}

    ours, theirs = phrases(fresh.malicious + fresh.benign), phrases(known.malicious + known.benign)
    assert len(ours & theirs) < 0.02 * len(ours)
    for form in FORMS:
        assert sum(text.startswith(form.partition("{act}")[0]) for text in fresh.malicious) == 8
