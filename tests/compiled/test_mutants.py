"""The faults that ``python tests/compiled/mutants`` plants: is what each one replaces still in the kernels?"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
_spec = spec_from_file_location("planted", Path(__file__).parent / "mutants" / "planted.py")
planted = module_from_spec(_spec)
_spec.loader.exec_module(planted)


@pytest.mark.parametrize("file", sorted({fault.file for fault in planted.FAULTS}))
def test_every_fault_can_be_planted(file):
    faults = [fault for fault in planted.FAULTS if fault.file == file]
    text = (KERNELS / file).read_text()
    assert [fault.what for fault in faults if text.count(fault.old) != fault.times] == []
    assert [fault.what for fault in faults if not 0 <= fault.which < fault.times or fault.new == fault.old] == []
    assert len({fault.what for fault in faults}) == len(faults)


def test_so_many_faults_are_planted():
    assert len(planted.FAULTS) >= 60
