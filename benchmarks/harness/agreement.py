"""Nothing is timed that does not compute the same."""

from collections.abc import Iterable, Mapping

from torch import Tensor


def check_agreement(results: Mapping[str, Iterable[Tensor]], tolerance: float) -> None:
    """Compare what every contender gives with what the first one gives.

    Raises:
        AssertionError: if the norm of a difference is above ``tolerance`` times the norm, or is not finite.
    """
    names = iter(results)
    first = next(names)
    expected = [tensor.detach().double() for tensor in results[first]]
    for name in names:
        for place, (tensor, reference) in enumerate(zip(results[name], expected, strict=True)):
            error = ((tensor.detach().double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()
            if not error <= tolerance:
                raise AssertionError(f"result {place} of {name} is {error:.2e} away from that of {first}")
