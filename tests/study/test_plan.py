"""What is planned can be run: every method of every budget is one that its defence takes."""

import inspect
import re
from dataclasses import fields

import pytest

from benchmarks.study.budgets import BUDGETS
from benchmarks.study.defences import DEFENCES
from benchmarks.study.earlier_settings import settings_now
from benchmarks.study.fresh import FORMS, fresh_prompts
from benchmarks.study.jobs import find_job
from procon.chat import builtin_prompts
from procon.errors import ProConError
from procon.training import ProConConfig


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_method_is_one_that_its_defence_takes(budget, tmp_path):
    known = {field.name for field in fields(ProConConfig)}
    for part in BUDGETS[budget].parts:
        assert [find_job(job).name for job in part.jobs] == list(part.jobs)
        for method in part.methods:
            try:
                settings = settings_now(method.config, tmp_path)
            except ProConError as error:
                if "is gone: run it at the commit" not in str(error):
                    raise
                continue
            defence = DEFENCES[method.defence]
            assert method.settings.keys() <= inspect.signature(defence.trainer.__init__).parameters.keys()
            assert set(settings) <= known
            defence.configure(ProConConfig(output_dir=str(tmp_path), report_to=[], **settings))


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
