"""How close is close: the tolerances of every comparison with a float64 reference, by dtype."""

from __future__ import annotations

import torch

# A few units in the last place: results are compared with float64 arithmetic on the same rounded inputs.
RELATIVE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
# Half of the smallest subnormal, which rounding may lose whatever the magnitude.
SMALLEST = {
    torch.float64: 0.0,
    torch.float32: 1e-45,
    torch.bfloat16: 1e-40,
    torch.float16: 2**-25,
}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    factor: float = 1.0,
    scale: float = 0.0,
    label: str = "result",
) -> None:
    """Assert |actual - expected| <= factor * (relative * (|expected| + scale) + smallest), element by element.

    Args:
        actual: What was computed.
        expected: The reference.
        dtype: Whose tolerance applies; by default that of ``actual``.
        factor: Loosens the tolerance, e.g. for rounding that adds up over steps; say why where it is used.
        scale: The magnitude of what was summed, for sums whose terms cancel.
        label: Names the comparison in the failure.
    """
    assert actual.shape == expected.shape, f"{label}: shape {list(actual.shape)} is not {list(expected.shape)}"
    dtype = dtype or actual.dtype
    ours, theirs = actual.detach().double(), expected.detach().double()
    allowed = factor * (RELATIVE[dtype] * (theirs.abs() + scale) + SMALLEST[dtype])
    error = (ours - theirs).abs()
    # Written so that a NaN on either side fails, and equal infinities pass.
    wrong = ~((error <= allowed) | (ours == theirs))
    if not wrong.any():
        return
    excess = torch.where(wrong, (error / allowed).nan_to_num(torch.inf), 0.0)
    flat = int(excess.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)]
    raise AssertionError(
        f"{label} ({dtype}): {int(wrong.sum())} of {wrong.numel()} elements differ; worst at {index}: "
        f"{ours.flatten()[flat].item()!r} instead of {theirs.flatten()[flat].item()!r}, "
        f"error {error.flatten()[flat].item():.3g}, allowed {allowed.flatten()[flat].item():.3g}"
    )


def max_abs(tensor: torch.Tensor) -> float:
    """The largest magnitude, 0 for an empty tensor: a scale for :func:`assert_close`."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
