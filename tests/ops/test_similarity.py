"""similarity, cross_similarity, harmonic_mean, bootstrap_interval and kps against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cat_rs
from cat_rs.errors import CatRsError, DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from tests import references

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}
SHAPES = {
    "tidy": (8, 64),
    "odd": (7, 13),
    "one": (1, 1),
    "one-column": (5, 1),
    "long-rows": (3, 1537),
    "large": (600, 515),
}
# Absolute, of scores in [0, 1]; float32 lanes over at most 1537 products.
TOLERANCE = {F64: 1e-14, F32: 3e-7, BF16: 3e-7, F16: 3e-7}


def by_id(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in table.items()]


def embeddings(rows: int, width: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Off-centre, as CLIP's embeddings are.
    return (torch.randn(rows, width, generator=generator) + 0.5).to(dtype)


def pair(shape: tuple[int, int], dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    return embeddings(*shape, dtype, seed=0), embeddings(*shape, dtype, seed=1)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize("shape", by_id(SHAPES))
def test_similarity_matches_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = pair(shape, dtype)
    ours = cat_rs.similarity(a, b)
    assert ours.dtype == (F64 if dtype == F64 else F32)
    np.testing.assert_allclose(ours.numpy(), references.similarity(wide(a), wide(b)), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(
    ("rows", "others", "width"), [(7, 5, 13), (1, 1, 1), (3, 200, 64), (130, 131, 33)], ids=lambda v: str(v)
)
def test_cross_similarity_matches_numpy(rows: int, others: int, width: int, reduce: str, dtype: torch.dtype) -> None:
    a, b = embeddings(rows, width, dtype), embeddings(others, width, dtype, seed=1)
    ours = cat_rs.cross_similarity(a, b, reduce)
    expected = getattr(references.cross_similarity(wide(a), wide(b)), reduce)(axis=1)
    assert ours.dtype == (F64 if dtype == F64 else F32)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_cross_similarity_takes_the_mean_by_default() -> None:
    a, b = pair((4, 8))
    assert torch.equal(cat_rs.cross_similarity(a, b), cat_rs.cross_similarity(a, b, "mean"))


def test_mixed_dtypes() -> None:
    a, b = embeddings(7, 13, BF16), embeddings(7, 13, F64, seed=1)
    ours = cat_rs.similarity(a, b)
    assert ours.dtype == F64
    np.testing.assert_allclose(ours.numpy(), references.similarity(wide(a), b.numpy()), rtol=0, atol=1e-14)


def test_known_angles() -> None:
    a = torch.tensor([[1.0, 0.0]] * 4)
    b = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-5.0, 0.0], [1.0, 1.0]])
    assert cat_rs.similarity(a, b).tolist() == pytest.approx([1.0, 0.5, 0.0, 0.5 + 0.125**0.5])


@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_scores_stay_in_0_to_1(dtype: torch.dtype) -> None:
    a = embeddings(500, 37, dtype)
    for score in (cat_rs.similarity(a, a), cat_rs.similarity(a, -a), cat_rs.cross_similarity(a, a, "max")):
        assert score.min() >= 0
        assert score.max() <= 1


@pytest.mark.parametrize("magnitude", [1e-15, 1e15], ids=str)
def test_magnitude_does_not_matter(magnitude: float) -> None:
    a, b = pair((5, 33))
    expected = references.similarity(a, b)
    np.testing.assert_allclose(cat_rs.similarity(a * magnitude, b).numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(cat_rs.similarity(a, b * magnitude).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_numpy_in_numpy_out(dtype: Any) -> None:
    a, b = (tensor.numpy().astype(dtype) for tensor in pair((7, 13)))
    ours = cat_rs.similarity(a, b)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(ours, references.similarity(a, b), rtol=0, atol=3e-7)
    assert isinstance(cat_rs.cross_similarity(a, b), np.ndarray)


def test_torch_out_where_one_input_is_torch() -> None:
    a, b = pair((7, 13))
    assert torch.equal(cat_rs.similarity(a, b.numpy()), cat_rs.similarity(a, b))


def test_strided_reversed_and_read_only_arrays() -> None:
    a, b = (tensor.numpy() for tensor in pair((8, 13)))
    expected = references.similarity(a, b)
    fortran = np.asfortranarray(a)
    np.testing.assert_allclose(cat_rs.similarity(fortran, b), expected, rtol=0, atol=3e-7)
    np.testing.assert_allclose(cat_rs.similarity(a[::-1], b[::-1]), expected[::-1], rtol=0, atol=3e-7)
    np.testing.assert_allclose(cat_rs.similarity(a[::2], b[::2]), expected[::2], rtol=0, atol=3e-7)
    a.flags.writeable = False
    np.testing.assert_allclose(cat_rs.similarity(a, b), expected, rtol=0, atol=3e-7)


def test_strided_tensors_and_tensors_with_a_gradient() -> None:
    a, b = pair((13, 8))
    ours = cat_rs.similarity(a.T.requires_grad_(), b.T)
    assert not ours.requires_grad
    np.testing.assert_allclose(ours.numpy(), references.similarity(a.detach().T, b.T), rtol=0, atol=3e-7)


def test_same_bits_on_any_number_of_threads() -> None:
    a, b = pair((700, 515))
    values = np.random.default_rng(0).uniform(0.2, 1.0, 50)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        scores = [cat_rs.similarity(a, b), *(cat_rs.cross_similarity(a, b[:70], reduce) for reduce in ("mean", "max"))]
        results.append((torch.stack(scores), cat_rs.bootstrap_interval(values, "harmonic_mean")))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")], ids=["zero", "nan", "inf"])
@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_a_row_without_a_direction_is_named(dtype: torch.dtype, which: str, value: float) -> None:
    a, b = pair((5, 40), dtype)
    row = a[3] if which == "a" else b[3]
    if value == 0:
        row.zero_()
    else:
        row[7] = value
    with pytest.raises(InvalidValueError, match="row 3"):
        cat_rs.similarity(a, b)
    for reduce in ("mean", "max"):
        with pytest.raises(InvalidValueError, match="row"):
            cat_rs.cross_similarity(a, b, reduce)


def test_cross_similarity_names_the_row_at_fault() -> None:
    a, b = embeddings(5, 8), embeddings(9, 8, seed=1)
    b[6] = 0
    for reduce in ("mean", "max"):
        with pytest.raises(InvalidValueError, match=r"`b`.* row 6"):
            cat_rs.cross_similarity(a, b, reduce)


BAD = {
    "int": (torch.ones(3, 4).long(), torch.ones(3, 4), DtypeError, "`a` must have dtype float32, .* got int64"),
    "numpy-int": (np.ones((3, 4), int), np.ones((3, 4)), DtypeError, "`a` must have dtype float32, .* got int64"),
    "meta": (torch.ones(3, 4), torch.ones(3, 4, device="meta"), DeviceError, "`b` must be on the CPU"),
    "sparse": (torch.ones(3, 4), torch.ones(3, 4).to_sparse(), LayoutError, "`b` must be a dense tensor"),
    "one-dimension": (torch.ones(4), torch.ones(4), ShapeError, r"`a` must have shape \[N, D\] .* got \[4\]"),
    "no-rows": (torch.ones(0, 4), torch.ones(0, 4), ShapeError, r"`a` must have shape \[N, D\] .* got \[0, 4\]"),
    "widths": (torch.ones(3, 4), torch.ones(3, 5), ShapeError, r"`b` must have shape .* got \[3, 5\]"),
}


@pytest.mark.parametrize("function", [cat_rs.similarity, cat_rs.cross_similarity], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("a", "b", "error", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_embeddings_are_named(function: Any, a: Any, b: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^similarity: {text}") as caught:
        function(a, b)
    assert isinstance(caught.value, CatRsError)


def test_unpaired_rows_are_an_error() -> None:
    with pytest.raises(ShapeError, match=r"`b` must have shape \[3, 4\], got \[2, 4\]"):
        cat_rs.similarity(torch.ones(3, 4), torch.ones(2, 4))


def test_an_unknown_reduction_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match="`reduce` must be 'mean' or 'max', got 'sum'"):
        cat_rs.cross_similarity(*pair((3, 4)), "sum")


@pytest.mark.parametrize("value", [[[1.0, 2.0]], None, 3.0], ids=["list", "none", "float"])
def test_what_is_no_array_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="got"):
        cat_rs.similarity(value, torch.ones(1, 2))


@pytest.mark.parametrize(
    "values",
    [[0.5, 0.25], (1.0,), torch.rand(50) + 0.1, np.linspace(0.2, 1, 9)[::2], torch.ones(2, dtype=BF16)],
    ids=["list", "tuple", "torch", "strided", "bf16"],
)
def test_harmonic_mean(values: Any) -> None:
    plain = values.tolist() if isinstance(values, torch.Tensor) else values
    assert cat_rs.harmonic_mean(values) == pytest.approx(references.harmonic_mean(plain), rel=1e-14)


def test_harmonic_mean_with_a_zero_is_zero() -> None:
    assert cat_rs.harmonic_mean([0.5, 0.0, 1.0]) == 0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        pytest.param([], "`values` must be at least one number, got none", id="none"),
        pytest.param([0.5, -0.25], "`values` must be >= 0 .* got -0.25 at index 1", id="negative"),
        pytest.param([0.5, float("nan")], "`values` must be finite, got NaN at index 1", id="nan"),
        pytest.param([float("inf")], "`values` must be finite, got inf at index 0", id="inf"),
    ],
)
def test_bad_values_are_named(values: list[float], text: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^harmonic_mean: {text}"):
        cat_rs.harmonic_mean(values)
    with pytest.raises(InvalidValueError, match=f"^bootstrap_interval: {text}"):
        cat_rs.bootstrap_interval(values, "harmonic_mean")


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_interval_covers_a_known_mean(confidence: float) -> None:
    random = np.random.default_rng(1)
    trials, hits = 400, 0
    for trial in range(trials):
        low, high = cat_rs.bootstrap_interval(
            random.normal(3.0, 2.0, 60), confidence=confidence, resamples=400, seed=trial
        )
        hits += low <= 3.0 <= high
    # Four standard errors, and the percentile interval's known shortfall of about a point at 60 values.
    slack = 4 * (confidence * (1 - confidence) / trials) ** 0.5
    assert confidence - 0.015 - slack <= hits / trials <= confidence + slack


@pytest.mark.parametrize("statistic", ["mean", "harmonic_mean"])
def test_bootstrap_interval_is_numpys(statistic: str) -> None:
    random = np.random.default_rng(2)
    values = random.uniform(0.3, 1.0, 40)
    draws = values[random.integers(0, 40, (20_000, 40))]
    statistics = draws.mean(1) if statistic == "mean" else 40 / (1 / draws).sum(1)
    expected = np.quantile(statistics, [0.025, 0.975])
    ours = cat_rs.bootstrap_interval(values, statistic, resamples=20_000, seed=3)
    # A 2.5 % quantile of 20,000 draws has a standard error of about 0.02 standard deviations.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.1 * statistics.std())


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(0).normal(size=30)
    first = cat_rs.bootstrap_interval(values, seed=1)
    assert first == cat_rs.bootstrap_interval(values, seed=1) == cat_rs.bootstrap_interval(list(values), seed=1)
    assert first != cat_rs.bootstrap_interval(values, seed=2)


def test_bootstrap_of_one_value_is_that_value() -> None:
    assert cat_rs.bootstrap_interval([0.3]) == pytest.approx((0.3, 0.3))


def test_bootstrap_of_the_mean_takes_negative_values() -> None:
    low, high = cat_rs.bootstrap_interval([-1.0, -2.0, 0.5])
    assert -2.0 <= low <= high <= 0.5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param({"confidence": 0.0}, r"`confidence` must be in \(0, 1\), got 0", id="confidence-0"),
        pytest.param({"confidence": 1.0}, r"`confidence` must be in \(0, 1\), got 1", id="confidence-1"),
        pytest.param({"confidence": float("nan")}, "`confidence` .* got NaN", id="confidence-nan"),
        pytest.param({"resamples": 1}, "`resamples` must be at least 2, got 1", id="resamples-1"),
        pytest.param({"resamples": -5}, "`resamples` must be at least 2, got -5", id="resamples-negative"),
        pytest.param({"seed": -1}, r"`seed` must be in 0\.\.2\*\*64 - 1, got -1", id="seed"),
        pytest.param(
            {"statistic": "median"}, "`statistic` must be 'mean' or 'harmonic_mean', got 'median'", id="statistic"
        ),
    ],
)
def test_bad_bootstrap_settings_are_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^bootstrap_interval: {text}"):
        cat_rs.bootstrap_interval([1.0, 2.0], **arguments)


@pytest.mark.parametrize("as_numpy", [False, True], ids=["torch", "numpy"])
def test_kps_matches_its_definition(as_numpy: bool) -> None:
    groups: list[Any] = [
        embeddings(12, 24, seed=0),
        embeddings(12, 24, seed=1),
        embeddings(9, 24, seed=2),
        embeddings(9, 24, seed=3),
    ]
    if as_numpy:
        groups = [group.numpy() for group in groups]
    result = cat_rs.kps(*groups)
    for name, value in references.kps(*groups).items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-6)
        low, high = getattr(result, f"{name}_interval")
        assert low <= getattr(result, name) <= high
    assert result.kps == pytest.approx(2 / (1 / result.ups + 1 / result.tps))


def test_kps_of_an_adapter_that_learned_nothing_is_1() -> None:
    base, trigger = embeddings(5, 16), embeddings(4, 16, seed=1)
    result = cat_rs.kps(base, base, trigger, trigger)
    assert (result.kps, result.ups, result.tps) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)


def test_kps_of_opposite_pictures_is_0() -> None:
    # Exact in float32, so that s is 0 and not a rounding error.
    base = torch.eye(4)
    result = cat_rs.kps(base, -base, base, base)
    assert (result.ups, result.tps, result.kps) == (0.0, 1.0, 0.0)
    assert result.kps_interval == (0.0, 0.0)
