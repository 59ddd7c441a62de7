"""The quickstart and what it is made of: a small model, taught to refuse, and a task to fine-tune it on.

In: nothing, or a chat model's name.
Out: runs with and without the constraint, and their report.
May import: every room but ``cli``. The method imports nothing of it.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.demo.arithmetic import Problem, arithmetic_problems
from procon.demo.model import fetch_demo_model, teach_refusal

__all__ = ["Problem", "arithmetic_problems", "fetch_demo_model", "teach_refusal"]
