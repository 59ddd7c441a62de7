"""What a size measures: the task problems that no choice has seen."""

from benchmarks.study.jobs import find_job
from benchmarks.study.plan import Size

SIZE = Size(train=6, test=4, chosen_on=("arithmetic",))


def test_held_out_runs_have_problems_that_no_choice_has_seen():
    for name in ("arithmetic", "arithmetic_poisoned_10", "identity"):
        job = find_job(name)
        trained, seen, kept = (job.problems(14, 0)[part] for part in (slice(6), slice(6, 10), slice(10, 14)))
        assert SIZE.problems(job, "validation") == seen
        assert SIZE.problems(job, "held_out") == kept
        texts = [{problem["instruction"] for problem in problems} for problems in (trained, seen, kept)]
        assert not texts[0] & texts[1] | texts[1] & texts[2] | texts[0] & texts[2]


def test_other_jobs_have_their_first():
    job = find_job("swapped")
    assert SIZE.problems(job, "held_out") == SIZE.problems(job, "validation") == job.problems(10, 0)[6:]
