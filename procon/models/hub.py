"""Names on the hub: apart from paths, and asked for only if the hub is there, so that a wrong one fails at once."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from procon.errors import ProConError
from procon.settings import check_name

#: Seconds that the hub has to answer in.
_PATIENCE = 5


def check_model_name(name: str | Path) -> None:
    """Raise ProConError if ``name`` is no model that can be had: no folder, not in the cache, and the hub is away.

    Otherwise transformers would try to reach the hub again and again, for half a minute.
    """
    check_name(name)
    if os.path.exists(name) or constants.HF_HUB_OFFLINE or any(_is_cached(str(name), file) for file in _CONFIGURATIONS):
        return
    if reason := _away(constants.ENDPOINT):
        raise ProConError(
            f"model {str(name)!r} cannot be loaded (no folder here, not in the cache, and {constants.ENDPOINT} cannot "
            f"be reached: {reason}): give a folder or a hub name"
        )


#: What a model's folder has, that of an adapter too.
_CONFIGURATIONS = ("config.json", "adapter_config.json")


def _is_cached(name: str, file: str) -> bool:
    return isinstance(try_to_load_from_cache(name, file), str)


def _away(endpoint: str) -> str | None:
    """Why nobody answers there; None if somebody does, whatever the answer is."""
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310  # the user's own, or the hub's
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE):  # noqa: S310
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # Certificates of a company's own are known to the hub's library and not to this one.
        return None if "CERTIFICATE" in str(error.reason) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
