"""Is a pass of the compiler that changes a kernel's meaning named? A planted one is, as the audit of passes is made."""

import pytest

pytest.importorskip("ttsem", reason="it runs what each pass makes")

from benchmarks.audit import passes

pytestmark = pytest.mark.gpu


def test_a_pass_that_changes_the_meaning_is_named(monkeypatch):
    names = []

    def first_four(dump: str) -> list[tuple[str, str]]:
        """As if the second pass added where the kernel multiplies, and the third put it right again."""
        stages = split(dump)[:4]
        names[:] = [name for name, _ in stages]
        name, module = stages[2]
        assert '"arith.mulf"' in module
        stages[2] = name, module.replace('"arith.mulf"', '"arith.addf"', 1)
        return stages

    split, calls = passes.validate.split_dump, passes.calls
    monkeypatch.setattr(passes.validate, "split_dump", first_four)
    monkeypatch.setattr(passes, "calls", lambda *shape: {"norm forward": calls(*shape)["norm forward"]})
    (record,) = records = passes.run(["sm_90"])
    assert record["verdicts"] == {"match": 3, "mismatch": 1}
    assert record["changed_by"] == names[1]
    with pytest.raises(SystemExit, match=r"changes the meaning of a kernel.*norm forward"):
        passes.show(records)
