"""Directions, of refusal or any other concept: found, kept in a file, compared.

In: contrast prompts, and the model as it now is; or given vectors.
Out: one direction or several per block, with what they were made from.
May import: ``chat``, ``models``, ``ops`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.directions.controls import randomized
from procon.directions.directions import DIRECTIONS_FILE, Directions
from procon.directions.extraction import ContrastMeans, auroc, each_last_token, project_last_token

__all__ = [
    "DIRECTIONS_FILE",
    "ContrastMeans",
    "Directions",
    "auroc",
    "each_last_token",
    "project_last_token",
    "randomized",
]
