"""Refusal directions: found, kept in a file, compared.

In: contrast prompts, and the model as it now is.
Out: one direction or several per block, with what they were made from.
May import: ``chat``, ``models``, ``ops`` and the leaves.
"""

from procon.directions.contrast_means import ContrastMeans, each_last_token
from procon.directions.refusal_directions import DIRECTIONS, RefusalDirections, auroc, project_last_token
from procon.directions.subspace import mean_squared_cosine

__all__ = [
    "DIRECTIONS",
    "ContrastMeans",
    "RefusalDirections",
    "auroc",
    "each_last_token",
    "mean_squared_cosine",
    "project_last_token",
]
