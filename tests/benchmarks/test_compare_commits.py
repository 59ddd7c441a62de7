"""What two commits are compared by."""

import torch

from benchmarks.compare_commits import workload


def test_a_step_and_a_lookup_run_again_and_again(tmp_path):
    threads = torch.get_num_threads()
    try:
        calls = workload(str(tmp_path), "smoke")
    finally:
        torch.set_num_threads(threads)
    for _ in range(2):
        calls["step"]()
        batch = calls["lookup"]()
    assert batch["anchors"].shape == (8, 96, 3)
    assert batch["constraint_mask"].all()
