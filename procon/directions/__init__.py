"""Directions, of refusal or any other concept: found, kept in a file, compared.

In: contrast prompts, and the model as it now is; or given vectors.
Out: one direction or several per block, with what they were made from.
May import: ``chat``, ``models``, ``ops`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.directions.block_directions import DIRECTIONS, BlockDirections
from procon.directions.contrast_means import ContrastMeans, each_last_token
from procon.directions.directions import Directions, load_directions
from procon.directions.given_vectors import load_vectors
from procon.directions.projections import auroc, project_last_token, project_on_all
from procon.directions.refusal_directions import RefusalDirections
from procon.directions.subspace import mean_squared_cosine

__all__ = [
    "DIRECTIONS",
    "BlockDirections",
    "ContrastMeans",
    "Directions",
    "RefusalDirections",
    "auroc",
    "each_last_token",
    "load_directions",
    "load_vectors",
    "mean_squared_cosine",
    "project_last_token",
    "project_on_all",
]
