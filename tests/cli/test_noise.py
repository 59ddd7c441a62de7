"""Standard output is the command's own; what libraries say is filtered, and stands under their own names."""

import logging
import sys
import types
import warnings

import pytest

from procon.cli.noise import others_apart


def warn_from(module: str, message: str, category: type[Warning] = UserWarning) -> None:
    """As code of ``module`` warns that says the cause is further up."""
    code = types.ModuleType(module)
    exec("import warnings\ndef warn(m, c): warnings.warn(m, c, stacklevel=3)", vars(code))
    code.warn(message, category)


@pytest.mark.parametrize(
    ("module", "message", "category", "line"),
    [
        ("procon.chat.refusal", "it does not\nrefuse", UserWarning, "procon: warning: it does not refuse\n"),
        ("torch.utils.data", "workers", UserWarning, "torch: warning: workers\n"),
        ("torch.utils.data", "'pin_memory' argument is set as true but no accelerator is found", UserWarning, ""),
        ("transformers.trainer", "old", FutureWarning, ""),
        ("peft", "\x1b[2J", UserWarning, "peft: warning: \\x1b[2J\n"),
    ],
)
def test_warnings_stand_under_the_name_of_who_warns(module, message, category, line, capsys):
    with others_apart():
        warnings.simplefilter("always")
        warn_from(module, message, category)
    assert capsys.readouterr().err == line


def test_logs_leave_standard_output(capsys):
    logger = logging.getLogger("DeepSpeed-like")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with others_apart():
            logger.warning("Setting accelerator to CPU. If you have a GPU")
            logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
            logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr() == ("", "something else\n")


def test_afterwards_all_is_as_before():
    make, show = logging.getLogRecordFactory(), warnings.showwarning
    with pytest.raises(ZeroDivisionError), others_apart():
        1 / 0  # noqa: B018
    assert logging.getLogRecordFactory() is make
    assert warnings.showwarning is show
