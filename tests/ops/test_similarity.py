"""similarity, cross_similarity and kps against NumPy in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import harness

import cat_rs
from cat_rs.errors import CatRsError, DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from tests import references
from tests.backends import about_kernels

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


@pytest.mark.parametrize("width", [33, 1537])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-21, 1e-15, 1e15, 1e20, 1e30], ids=str)
def test_magnitude_does_not_matter(magnitude: float, width: int) -> None:
    a, b = pair((5, width))
    expected = references.cross_similarity(a, b)
    for scaled in ((a * magnitude, b), (a, b * magnitude)):
        np.testing.assert_allclose(cat_rs.similarity(*scaled).numpy(), expected.diagonal(), rtol=0, atol=1e-6)
        for reduce in ("mean", "max"):
            reference = getattr(expected, reduce)(axis=1)
            np.testing.assert_allclose(cat_rs.cross_similarity(*scaled, reduce), reference, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_views_of_every_kind(dtype: torch.dtype) -> None:
    whole = embeddings(40, 1100, dtype)
    views = {
        "columns": (whole[:, 100:700], whole[:, 400:1000]),
        "every second column": (whole[:, ::2], whole[:, 1::2]),
        "transposed": (whole[:, :37].T, whole[:, 37:74].T),
        "one row for all": (whole[3].expand(40, 1100), whole),
        "one column for all": (whole[:, :1].expand(40, 9), whole[:, 5:14]),
        "overlapping": (
            whole.flatten().as_strided((50, 600), (300, 1)),
            whole.flatten().as_strided((50, 600), (7, 3)),
        ),
    }
    for name, (a, b) in views.items():
        ours = cat_rs.similarity(a, b)
        expected = references.similarity(wide(a), wide(b))
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=TOLERANCE[dtype], err_msg=name)
        for reduce in ("mean", "max"):
            crossed = cat_rs.cross_similarity(a, b, reduce)
            assert torch.equal(crossed, cat_rs.cross_similarity(a.contiguous(), b.contiguous(), reduce)), name


def test_a_read_only_array_stays_as_it_is(tmp_path: Path) -> None:
    a, b = (tensor.numpy() for tensor in pair((8, 13)))
    np.save(tmp_path / "a.npy", a)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert np.array_equal(cat_rs.similarity(mapped, b), cat_rs.similarity(a, b))
    assert not mapped.flags.writeable
    # Its memory outlives the array that was passed.
    assert np.array_equal(cat_rs.similarity(np.frombuffer(a.tobytes(), np.float32).reshape(8, 13), a), np.ones(8, "f"))


def test_fields_of_a_record_array() -> None:
    a, b = (tensor.numpy() for tensor in pair((8, 13)))
    records = np.empty(8, dtype=[("embedding", np.float32, 13), ("label", np.int8)])
    records["embedding"] = a
    assert np.array_equal(cat_rs.similarity(records["embedding"], b), cat_rs.similarity(a, b))


def test_strided_tensors_and_tensors_with_a_gradient() -> None:
    a, b = pair((13, 8))
    ours = cat_rs.similarity(a.T.requires_grad_(), b.T)
    assert not ours.requires_grad
    np.testing.assert_allclose(ours.numpy(), references.similarity(a.detach().T, b.T), rtol=0, atol=3e-7)


def test_same_bits_on_any_number_of_threads() -> None:
    a, b = pair((700, 515))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        scores = [cat_rs.similarity(a, b), *(cat_rs.cross_similarity(a, b[:70], reduce) for reduce in ("mean", "max"))]
        results.append(torch.stack(scores))
    assert torch.equal(*results)


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
    strided = (torch.stack([one, one], dim=1)[:, 0] for one in (a, b))
    with pytest.raises(InvalidValueError, match=f"`{which}`.* row 3"):
        cat_rs.similarity(*strided)


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


@pytest.mark.parametrize("kind", ["no_trigger", "trigger"])
@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        pytest.param(
            lambda b: b.index_fill(0, torch.tensor(3), 0.0),
            InvalidValueError,
            "`b` .* got row 3, which is zero",
            id="zero",
        ),
        pytest.param(
            lambda b: b.index_fill(0, torch.tensor(4), torch.nan),
            InvalidValueError,
            "`b` .* got row 4, .* NaN",
            id="nan",
        ),
        pytest.param(lambda b: b[:4], ShapeError, r"`b` must have shape \[5, 8\], got \[4, 8\]", id="fewer"),
        pytest.param(lambda b: b[:0], ShapeError, "`b` must have shape", id="none"),
        pytest.param(lambda b: b.long(), DtypeError, "`b` must have dtype", id="dtype"),
    ],
)
def test_kps_names_what_is_at_fault(kind: str, spoil: Any, error: type[Exception], text: str) -> None:
    groups = {
        f"{model}_{own}": embeddings(5, 8, seed=index)
        for index, (own, model) in enumerate(itertools.product(("no_trigger", "trigger"), ("base", "adapted")))
    }
    groups[f"adapted_{kind}"] = spoil(groups[f"adapted_{kind}"])
    with pytest.raises(error, match=rf"^kps of base_{kind} \(a\) and adapted_{kind} \(b\): similarity: {text}"):
        cat_rs.kps(**groups)


def test_kps_of_a_single_pair_is_an_error() -> None:
    one, two = embeddings(1, 8), embeddings(2, 8)
    with pytest.raises(InvalidValueError, match=r"^kps of base_trigger .*: `values` must be at least two .* got 1"):
        cat_rs.kps(two, two, one, one)


def test_kps_of_clusters() -> None:
    groups = [embeddings(rows, 24, seed=seed) for seed, rows in enumerate((12, 12, 9, 9))]
    clusters = np.arange(12) // 3, np.arange(9) // 3
    ours = cat_rs.kps(*groups, clusters=clusters)
    values = [references.similarity(*groups[:2]), references.similarity(*groups[2:])]
    for index, interval in enumerate((ours.ups_interval, ours.tps_interval)):
        own = cat_rs.bootstrap_interval(values[index], "harmonic_mean", clusters=clusters[index])
        assert interval == pytest.approx(own, abs=1e-6)
    expected = references.bootstrap([values], "harmonic_mean", 4000, clusters)[0]
    np.testing.assert_allclose(
        ours.kps_interval, np.quantile(expected, [0.025, 0.975]), rtol=0, atol=0.25 * expected.std()
    )
    with pytest.raises(InvalidValueError, match=r"^kps of base_trigger .*: `clusters` must be as many .* 9, got 12"):
        cat_rs.kps(*groups, clusters=(clusters[0], clusters[0]))
    with pytest.raises(InvalidValueError, match=r"^kps: `clusters` must be two groups, .* got a tuple of length 1"):
        cat_rs.kps(*groups, clusters=(clusters[0],))  # type: ignore[arg-type]


# What the inputs' own rounding may cost, and what the arithmetic may cost beside.
ROUNDING = {F32: 1e-6, F16: 1e-3, BF16: 1e-2}
ARITHMETIC = 3e-7


@pytest.mark.parametrize(
    ("dtype", "as_numpy"),
    [
        pytest.param(F32, False, id="f32-torch"),
        pytest.param(F32, True, id="f32-numpy"),
        pytest.param(F16, False, id="f16-torch"),
        pytest.param(F16, True, id="f16-numpy"),
        pytest.param(BF16, False, id="bf16-torch"),
    ],
)
def test_many_pairs(dtype: torch.dtype, as_numpy: bool) -> None:
    count, width = 100_000, 64
    exact = torch.randn(2, count, width, dtype=F64) + 0.5
    # Adapted pictures from nearly the base's to those of another prompt.
    exact[1] = exact[0] + torch.linspace(0.05, 4, count, dtype=F64)[:, None] * exact[1]
    rounded = exact.to(dtype)
    base, adapted = rounded.numpy() if as_numpy else rounded
    # The pairs with the trigger are a part of them, so that a test of this size takes little memory.
    trigger = slice(0, count // 2)
    ours = cat_rs.kps(base, adapted, base[trigger], adapted[trigger], resamples=2)
    values = torch.as_tensor(cat_rs.similarity(base, adapted)).double().numpy()
    for inputs, tolerance in ((exact, ROUNDING[dtype]), (rounded.double(), ARITHMETIC)):
        expected = references.similarity(*inputs)
        np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
        ups, tps = references.harmonic_mean(expected), references.harmonic_mean(expected[trigger])
        assert (ours.ups, ours.tps) == pytest.approx((ups, tps), rel=0, abs=tolerance)
        assert ours.kps == pytest.approx(references.harmonic_mean([ups, tps]), rel=0, abs=tolerance)


def _memory_cases() -> dict[str, Any]:
    count, width = 100_000, 128
    rows = torch.randn(count + 1, width)
    wide_rows = torch.randn(count + 1, width + 1)[:, 1:]
    read_only = rows.numpy().view()
    read_only.flags.writeable = False
    return {
        "float32": rows,
        "bfloat16": rows.bfloat16(),
        "some columns": wide_rows,
        "transposed": torch.randn(width, count + 1).T,
        "read-only numpy": read_only,
        "some columns, numpy": wide_rows.numpy(),
    }


@about_kernels
def test_memory_does_not_grow_with_the_width() -> None:
    for name, rows in _memory_cases().items():
        a, b = rows[:-1], rows[1:]
        values = cat_rs.similarity(a, b)
        clusters = np.arange(len(a)) // 2
        operations: dict[str, Callable[[], Any]] = {
            "similarity": lambda a=a, b=b: cat_rs.similarity(a, b),
            "drift": lambda a=a, b=b: 1 - cat_rs.similarity(a, b).mean(),
            "kps": lambda a=a, b=b: cat_rs.kps(a, b, a, b, resamples=2),
            "cross_similarity": lambda a=a, b=b: cat_rs.cross_similarity(a, b[:2], "max"),
            "interval": lambda s=values, c=clusters: cat_rs.bootstrap_interval(s, clusters=c, resamples=2),
            "difference": lambda s=values, c=clusters: cat_rs.bootstrap_difference(s, s, clusters=c, resamples=2),
            "kps_difference": lambda s=values: cat_rs.kps_difference((s, s), (s, s), resamples=2),
        }
        for operation, run in operations.items():
            extra = harness.extra_memory(run)
            # As 64 MB for 10^6 pairs, and some pages; a copy of an input has 51 MB, in bfloat16 26 MB.
            assert extra <= 6.4e6 + 2e6, f"{operation} of {name}: {extra / 1e6:.1f} MB"
