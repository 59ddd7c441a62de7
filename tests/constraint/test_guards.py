"""What stops a training that would go on without the constraint, or without numbers."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from procon.constraint.guards import check_finite, refuse_data_parallel
from procon.constraint.reach import reaches_a_parameter
from procon.errors import ProConError
from procon.ops import constrain, rms_norm_constrain


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_gpu_or_none_is_no_data_parallel(gpus):
    refuse_data_parallel(gpus)


@pytest.mark.parametrize("gpus", [2, 8])
def test_data_parallel_is_refused(gpus):
    with pytest.raises(ProConError, match=r"^nn\.DataParallel copies the model without its hooks: start one process"):
        refuse_data_parallel(gpus)


@pytest.mark.parametrize("penalty", ["nan", "inf", "-inf"])
def test_a_penalty_that_is_no_number_stops_the_training(penalty):
    with pytest.raises(ProConError, match=f"^the penalty became {penalty} by step 7, so hidden states are NaN or inf"):
        check_finite(float(penalty), 7)
    for number in (0.0, 1e308, -1.0):
        check_finite(number, 7)


class TestReach:
    """From the graph alone: does backward from a penalty arrive at a parameter?"""

    @pytest.fixture
    def direction(self) -> torch.Tensor:
        return torch.ones(4)

    def penalties(self, hidden: torch.Tensor, direction: torch.Tensor) -> list[torch.Tensor]:
        _, plain = constrain(hidden, direction)
        _, within = rms_norm_constrain(hidden, nn.Parameter(torch.ones(4)), 1e-6, direction)
        return [plain, within]

    def test_a_parameter_below(self, direction):
        for penalty in self.penalties(nn.Linear(4, 4)(torch.randn(3, 4)).tanh(), direction):
            assert reaches_a_parameter([penalty])

    def test_the_norms_own_weight_gets_nothing_of_it(self, direction):
        hidden = torch.randn(3, 4, requires_grad=True)  # and is no parameter
        for penalty in self.penalties(hidden.exp(), direction):
            assert penalty.requires_grad
            assert not reaches_a_parameter([penalty])
        assert not reaches_a_parameter([])
        assert not reaches_a_parameter([torch.zeros(())])

    def test_one_of_many_is_enough(self, direction):
        leaf = torch.randn(3, 4, requires_grad=True)
        dead = self.penalties(leaf, direction) + self.penalties(leaf.sin(), direction)
        alive = self.penalties(nn.Embedding(5, 4)(torch.tensor([1, 2, 3])), direction)
        assert not reaches_a_parameter(dead)
        for one in alive:
            assert reaches_a_parameter([*dead, one])
            assert reaches_a_parameter([one, *dead])

    def test_through_another_penalty(self, direction):
        hidden, _ = constrain(nn.Linear(4, 4)(torch.randn(3, 4)), direction)
        hidden, _ = rms_norm_constrain(hidden, torch.ones(4), 1e-6, direction)
        assert all(reaches_a_parameter([penalty]) for penalty in self.penalties(hidden, direction))

    def test_what_another_node_hides_counts(self, direction):
        layer = nn.Linear(4, 4)
        hidden = checkpoint(layer, torch.randn(3, 4, requires_grad=True), use_reentrant=True)
        assert all(reaches_a_parameter([penalty]) for penalty in self.penalties(hidden, direction))

    def test_a_frozen_model(self, direction):
        layer = nn.Linear(4, 4).requires_grad_(False)
        hidden = layer(torch.randn(3, 4, requires_grad=True))
        assert not any(reaches_a_parameter([penalty]) for penalty in self.penalties(hidden, direction))
