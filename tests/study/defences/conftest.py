"""The data that defences are tried on."""

import pytest
from datasets import Dataset


@pytest.fixture
def dataset(samples) -> Dataset:
    return Dataset.from_list(samples)
