"""The values of the CUDA kernels, whose sources run on the CPU here: against float64 references, at any offset."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests import references
from tests.cuda.shim import DTYPES, Compiler, Guarded, Program, pack, real_of, scalar, source_of, unwritten
from tests.tolerances import assert_close, max_abs

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ALONE = [(dtype, dtype) for dtype in (F32, F64, BF16, F16)]
PAIRS = [*ALONE, (BF16, F32), (F32, F16), (F16, F64)]
NAMES = ("model_pred", "target", "model_pred_no_trigger", "base_pred")


def id_of(value: Any) -> str | None:
    if isinstance(value, torch.dtype):
        return DTYPES[value]
    if isinstance(value, tuple):
        return "-".join(id_of(one) or str(one) for one in value)
    return None


def each(name: str, values: Any) -> Any:
    return pytest.mark.parametrize(name, values, ids=id_of)


# Dtypes


def test_narrowing_and_widening_are_those_of_pytorch(compiler: Compiler) -> None:
    more = """
        extern "C" void narrow_to(const f32* from, bf16* bf, f16* half, u64 count) {
            for (u64 i = 0; i < count; ++i) { narrow(from[i], bf[i]); narrow(from[i], half[i]); }
        }
        extern "C" void widen_from(const bf16* bf, const f16* half, f32* out_bf, f32* out_half, u64 count) {
            for (u64 i = 0; i < count; ++i) { out_bf[i] = widen<f32>(bf[i]); out_half[i] = widen<f32>(half[i]); }
        }
    """
    defines = {"REAL": F32, "LATENT": F32, "NOISE": F32}
    library = ctypes.CDLL(str(compiler.library("noising", defines, source_of("noising"), more)))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    out_bf, out_half = torch.empty(2**16), torch.empty(2**16)
    library.widen_from(*(ctypes.c_void_p(t.data_ptr()) for t in (every, every, out_bf, out_half)), len(every))
    torch.testing.assert_close(out_bf, every.view(BF16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out_half, every.view(F16).float(), rtol=0, atol=0, equal_nan=True)

    # Every value of either dtype, the middles between neighbours, and what lies beside both.
    around = [value.float().unique()[:-1] for value in (every.view(BF16), every.view(F16))]
    around = [value[value.isfinite()] for value in around]
    middles = [(value[1:] + value[:-1]) / 2 for value in around]
    exact = torch.cat([*around, *middles])
    special = torch.tensor([math.inf, -math.inf, math.nan])
    values = torch.cat([exact, exact * (1 + 2**-20), exact * (1 - 2**-20), special])
    bf, half = torch.empty(len(values), dtype=BF16), torch.empty(len(values), dtype=F16)
    library.narrow_to(*(ctypes.c_void_p(t.data_ptr()) for t in (values, bf, half)), len(values))
    for ours, theirs in ((bf, values.to(BF16)), (half, values.to(F16))):
        wrong = (ours.view(torch.int16) != theirs.view(torch.int16)) & ~(ours.isnan() & theirs.isnan())
        assert not wrong.any(), values[wrong][:5]


# The CAT loss


@dataclasses.dataclass
class LossCase:
    """A CAT loss as the launches in cuda.rs prepare it."""

    shape: tuple[int, ...]
    pred: torch.dtype = F32
    target: torch.dtype = F32
    mask_shape: tuple[int, ...] | None = None
    mask_normalize: bool = False
    weighted: bool = False
    cat_factor: float = 0.7
    scale: float = 1.0
    # Elements by which tensors lie behind a 16-byte boundary: prediction, target, gradient, mask.
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)
    blocks: int = 3
    backwards: bool = False
    on_device: bool = False
    gradients: bool = True

    def check(self, compiler: Compiler, mutation: tuple[str, str] | None = None) -> None:
        """The values and gradients are the reference's."""
        real = real_of(self.pred, self.target)
        defines = {"REAL": real, "PRED": self.pred, "TARGET": self.target}
        program = compiler.program("cat_loss", defines, mutation)
        generator = torch.Generator().manual_seed(1)
        batch, per_sample = self.shape[0], math.prod(self.shape[1:])
        tensors = {
            name: Guarded(
                torch.randn(self.shape, generator=generator).to(self.pred if index % 2 == 0 else self.target),
                self.offsets[index % 2],
            )
            for index, name in enumerate(NAMES)
        }
        weights = torch.rand(batch, generator=generator).to(real) + 0.1 if self.weighted else None
        mask = None
        if self.mask_shape is not None:
            mask = Guarded(torch.rand(self.mask_shape, generator=generator).gt(0.4).to(real), self.offsets[3])
            if self.mask_normalize and self.mask_shape[0] > 1:
                mask.tensor[0] = 0
        ours = self.run(program, tensors, weights, mask, real)
        twins = {name: tensor.tensor.double().clone() for name, tensor in tensors.items()}
        for name in NAMES[::2]:
            twins[name].requires_grad_()
        expected = references.cat_loss(
            **twins,
            cat_factor=self.cat_factor,
            sample_weight=weights,
            mask=None if mask is None else mask.tensor,
            mask_normalize=self.mask_normalize,
        )
        for name in ("total", "diffusion", "cat"):
            assert_close(ours[name], getattr(expected, name), label=name)
        (expected.total * self.scale).backward()
        for name in NAMES[::2]:
            if self.gradients:
                gradient = twins[name].grad
                assert gradient is not None
                assert_close(ours[name].check(), gradient, label=f"gradient of {name}")
        assert per_sample

    def run(
        self,
        program: Program,
        tensors: dict[str, Guarded],
        weights: torch.Tensor | None,
        mask: Guarded | None,
        real: torch.dtype,
    ) -> dict[str, Any]:
        """The values, and the gradients by the names of their predictions."""
        batch, per_sample = self.shape[0], math.prod(self.shape[1:])
        mask_rows, row = 0, per_sample
        if mask is not None:
            mask_rows = mask.tensor.shape[0]
            row = mask.tensor.numel() // mask_rows
        grads = [unwritten(self.shape, self.pred, self.offsets[2]) if self.gradients else None for _ in range(2)]
        sums = unwritten((mask_rows,), F64) if self.mask_normalize else None
        if sums is not None:
            program.run("mask_sums", pack(mask, sums, row), (mask_rows, 1), backwards=self.backwards)
            sums.check()
        partials = unwritten((2 * self.blocks,), F64)
        factor, scale = (
            [torch.tensor(self.cat_factor, dtype=F32), torch.tensor(self.scale, dtype=F64)]
            if self.on_device
            else [self.cat_factor, self.scale]
        )
        terms = [
            value
            for index in range(2)
            for value in (
                *(tensors[NAMES[2 * index]], tensors[NAMES[2 * index + 1]], grads[index], index),
                *(weights, mask, sums, 1 / (batch * per_sample), batch, per_sample // row, row, int(mask_rows > 1)),
            )
        ]
        loss = pack(*terms, partials, *scalar(factor), *scalar(scale))
        program.run("cat_loss", loss, (self.blocks, 2), backwards=self.backwards)
        total, parts = unwritten((), real), unwritten((2,), real)
        values = pack(partials, self.blocks, self.blocks, *scalar(factor), total, parts)
        program.run("cat_loss_values", values, backwards=self.backwards)
        partials.check()
        diffusion, cat = parts.check()
        gradients = dict(zip(NAMES[::2], grads, strict=True))
        return {"total": total.check(), "diffusion": diffusion, "cat": cat, **gradients}


@each("dtypes", PAIRS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5,), (3, 5, 7, 11), (1, 4, 37, 61), (2, 8200)], ids=lambda shape: "x".join(map(str, shape))
)
def test_cat_loss(compiler: Compiler, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    LossCase(shape, *dtypes, weighted=True).check(compiler)


@each("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize(
    "offsets",
    [(1, 1, 1, 1), (3, 3, 3, 3), (1, 2, 0, 3), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (7, 7, 7, 7)],
    ids=str,
)
def test_cat_loss_of_misaligned_tensors(
    compiler: Compiler, offsets: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    LossCase((2, 3, 37, 61), *dtypes, mask_shape=(2, 1, 37, 61), offsets=offsets).check(compiler)


@pytest.mark.parametrize(
    "mask_shape", [(2, 1, 37, 61), (1, 1, 37, 61), (2, 3, 37, 61), (1, 3, 37, 61)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("mask_normalize", [False, True], ids=["mean", "normalized"])
@each("dtypes", [(F32, F32), (BF16, BF16), (F64, F64)])
def test_cat_loss_with_masks(
    compiler: Compiler, dtypes: tuple[torch.dtype, torch.dtype], mask_normalize: bool, mask_shape: tuple[int, ...]
) -> None:
    case = LossCase((2, 3, 37, 61), *dtypes, mask_shape=mask_shape, mask_normalize=mask_normalize, weighted=True)
    case.check(compiler)


@pytest.mark.parametrize("blocks", [1, 2, 40])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_cat_loss_with_any_number_of_blocks(compiler: Compiler, blocks: int, backwards: bool) -> None:
    shape = (3, 2, 50, 100)
    case = LossCase(shape, mask_shape=(3, 1, 50, 100), mask_normalize=True, blocks=blocks, backwards=backwards)
    case.check(compiler)


@each("dtypes", ALONE)
def test_cat_loss_with_factors_on_the_device(compiler: Compiler, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    LossCase((2, 333), *dtypes, on_device=True, cat_factor=0.375, scale=1024.0).check(compiler)


def test_small_errors_keep_their_float16_gradients(compiler: Compiler) -> None:
    case = LossCase((4, 4, 128, 128), F16, F16, scale=2.0**16, on_device=True)
    program = compiler.program("cat_loss", {"REAL": F32, "PRED": F16, "TARGET": F16})
    errors = 1e-3 * (torch.rand(case.shape) + 0.5) * torch.randn(case.shape).sign()
    tensors = {name: Guarded(torch.zeros(case.shape, dtype=F16)) for name in NAMES}
    tensors["model_pred_no_trigger"].tensor.copy_(errors)
    gradient = case.run(program, tensors, None, None, F32)["model_pred_no_trigger"].check()
    exact = 2 * case.cat_factor * case.scale / errors.numel() * tensors["model_pred_no_trigger"].tensor.double()
    assert gradient.all()
    assert ((gradient.double() - exact) / exact).abs().max() <= 2e-3


def test_cat_loss_without_gradients(compiler: Compiler) -> None:
    LossCase((2, 333), gradients=False).check(compiler)


def test_cat_loss_is_repeatable_bit_for_bit(compiler: Compiler) -> None:
    case = LossCase((3, 9000), weighted=True)
    program = compiler.program("cat_loss", {"REAL": F32, "PRED": F32, "TARGET": F32})
    tensors = {name: Guarded(torch.randn(case.shape)) for name in NAMES}
    first, second = (
        dataclasses.replace(case, backwards=backwards).run(program, tensors, None, None, F32)["total"]
        for backwards in (False, True)
    )
    assert torch.equal(first, second)


def test_a_term_alone(compiler: Compiler) -> None:
    """As terms of unequal dtypes are launched."""
    program = compiler.program("cat_loss", {"REAL": F32, "PRED": F32, "TARGET": F32})
    pred, target, grad = Guarded(torch.randn(2, 5)), Guarded(torch.randn(2, 5)), unwritten((2, 5), F32)
    partials = unwritten((2,), F64)
    term = (pred, target, grad, 1, None, None, None, 0.1, 2, 1, 5, 0)
    program.run("cat_loss", pack(*term, *term, partials, *scalar(0.25), *scalar(3.0)), (2, 1))
    error = pred.tensor.double() - target.tensor.double()
    assert_close(partials.check().sum(), (error**2).mean(), dtype=F32)
    assert_close(grad.check(), 2 * 0.25 * 3 * error / 10)


@each("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("factor", [1.0, 0.5, 3.3])
@pytest.mark.parametrize(("length", "offset"), [(1, 0), (5, 1), (1000, 3), (4096, 0)])
def test_scaling_of_gradients(compiler: Compiler, length: int, offset: int, factor: float, dtype: torch.dtype) -> None:
    program = compiler.program("cat_loss", {"REAL": real_of(dtype), "PRED": dtype, "TARGET": dtype})
    grads = [Guarded(torch.randn(length).to(dtype), offset) for _ in range(2)]
    before = [grad.tensor.clone() for grad in grads]
    scale = torch.tensor(factor, dtype=real_of(dtype))
    program.run("scale_gradients", pack(*grads, length, *scalar(scale)), (2, 2))
    for grad, old in zip(grads, before, strict=True):
        assert_close(grad.check(), old.double() * scale.double())
    program.run("scale_gradients", pack(grads[0], None, length, *scalar(scale)), (1, 1))
    assert_close(grads[0].check(), (before[0].double() * scale).to(dtype).double() * scale, factor=2)


# Noising


def check_noising(
    compiler: Compiler,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    prediction_type: str = "v_prediction",
    copies: int = 2,
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    mutation: tuple[str, str] | None = None,
) -> None:
    """Noisy latents and target are the reference's. offsets: latents, noise, noisy latents, target."""
    latent, noise = dtypes
    real = real_of(*dtypes)
    program = compiler.program("noising", {"REAL": real, "LATENT": latent, "NOISE": noise}, mutation)
    x, n = Guarded(torch.randn(shape).to(latent), offsets[0]), Guarded(torch.randn(shape).to(noise), offsets[1])
    signal, sigma = torch.rand(shape[0]).to(real), torch.rand(shape[0]).to(real)
    noisy = unwritten((copies, *shape), latent, offsets[2])
    target = None if prediction_type == "epsilon" else unwritten(shape, noise, offsets[3])
    flow = int(prediction_type == "flow")
    program.run("noising", pack(x, n, signal, sigma, noisy, target, copies, *shape, flow), (3, 1))
    expected, expected_target = references.noising(x.tensor, n.tensor, signal, sigma, prediction_type)
    scale = max_abs(x.tensor) + max_abs(n.tensor)
    # Two products that may cancel, each rounded.
    for copy in noisy.check():
        assert_close(copy, expected, scale=scale, factor=0.5, label="noisy latents")
    if target is not None:
        assert_close(target.check(), expected_target, scale=scale, factor=0.5, label="target")


@each("dtypes", PAIRS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 385), (2, 4608)], ids=str)
def test_noising(
    compiler: Compiler, shape: tuple[int, int], prediction_type: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check_noising(compiler, shape, dtypes, prediction_type)


@pytest.mark.parametrize("offsets", [(1, 1, 1, 1), (0, 1, 0, 0), (2, 2, 0, 2), (2, 2, 2, 0), (5, 5, 5, 5)], ids=str)
@pytest.mark.parametrize("copies", [1, 2, 3])
@each("dtype", [F32, BF16])
def test_noising_of_misaligned_tensors(
    compiler: Compiler, dtype: torch.dtype, copies: int, offsets: tuple[int, int, int, int]
) -> None:
    for shape in ((3, 129), (2, 256)):
        check_noising(compiler, shape, (dtype, dtype), copies=copies, offsets=offsets)


# AdamW


@dataclasses.dataclass
class AdamWCase:
    """Steps over flat buffers, as cuda.rs launches them."""

    length: int
    grad: torch.dtype = F32
    low: torch.dtype | None = None
    real: torch.dtype = F32
    max_grad_norm: float = math.inf
    # Elements by which tensors lie behind a 16-byte boundary: weights, gradients, moments, copy.
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)
    settings: torch.dtype = F64
    blocks: int = 3

    def program(self, compiler: Compiler, mutation: tuple[str, str] | None = None) -> Program:
        defines = {"REAL": self.real, "GRAD": self.grad, "LOW": self.low or self.grad}
        return compiler.program("adamw", defines, mutation)

    def buffers(self) -> dict[str, Guarded]:
        param, grad, moment, low = self.offsets
        zeros = torch.zeros(self.length, dtype=self.real)
        made = {
            "param": Guarded(torch.randn(self.length).to(self.real), param),
            "grad": Guarded(torch.zeros(self.length, dtype=self.grad), grad),
            "exp_avg": Guarded(zeros, moment),
            "exp_avg_sq": Guarded(zeros, moment),
        }
        return made | ({} if self.low is None else {"low": unwritten((self.length,), self.low, low)})

    def sum_of_squares(self, compiler: Compiler, grad: Guarded, sums: torch.Tensor, index: int) -> None:
        defines = {"REAL": real_of(self.grad), "GRAD": self.grad, "LOW": self.grad}
        program, partials = compiler.program("adamw", defines), unwritten((self.blocks,), F64)
        program.run("squares", pack(grad, self.length, partials), (self.blocks, 1))
        program.run("sum_partials", pack(partials, self.blocks, sums.data_ptr() + 8 * index))
        partials.check()

    def step(
        self,
        program: Program,
        buffers: dict[str, Guarded],
        settings: torch.Tensor,
        sums: torch.Tensor,
        count: torch.Tensor,
        skipped: torch.Tensor | None,
    ) -> None:
        numbers = unwritten((9,), self.real)
        prepare = pack(*scalar(settings), sums, len(sums), count, skipped, numbers)
        program.run("prepare", prepare)
        assert numbers.check().isfinite().all()
        names = ("param", "grad", "exp_avg", "exp_avg_sq", "low")
        update = pack(*(buffers.get(name) for name in names), numbers, self.length)
        program.run("adamw", update, (self.blocks, 1))

    def check(self, compiler: Compiler, mutation: tuple[str, str] | None = None, steps: int = 4) -> None:
        """Some steps are those of clip_grad_norm_ and torch.optim.AdamW in float64."""
        program, buffers = self.program(compiler, mutation), self.buffers()
        twin = torch.nn.Parameter(buffers["param"].tensor.double().clone())
        adamw = torch.optim.AdamW([twin], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        limit = self.max_grad_norm
        settings = torch.tensor([0.01, 0.8, 0.95, 1e-6, 0.1, limit], dtype=self.settings)
        sums = torch.full((2,), math.nan, dtype=F64)
        count, skipped = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for step in range(steps):
            grad = ((0.003, 0.3, 1.0)[step % 3] * torch.randn(self.length)).to(self.grad)
            other = 0.1 * torch.randn(7)
            buffers["grad"].tensor.copy_(grad)
            self.sum_of_squares(compiler, buffers["grad"], sums, 0)
            assert_close(sums[0], (grad.double() ** 2).sum(), dtype=real_of(self.grad))
            sums[1] = (other.double() ** 2).sum()
            self.step(program, buffers, settings, sums, count, skipped)
            # The norm is that of all gradients.
            twin.grad, rest = grad.double(), torch.nn.Parameter(torch.zeros(7, dtype=F64))
            rest.grad = other.double()
            torch.nn.utils.clip_grad_norm_([twin, rest], limit)
            adamw.step()
            assert int(count) == step + 1
            assert int(skipped) == 0
            state = adamw.state[twin]
            # float32 settings carry an error of half a unit each, and the clip factor that of the squares.
            factor = 8 if self.settings == F64 else 50
            dtype = self.real if math.isinf(limit) else real_of(self.grad)
            for name, expected in {"param": twin, **state}.items():
                if name == "step":
                    continue
                ours, scale = buffers[name].check(), max_abs(expected)
                assert_close(ours, expected, dtype=dtype, scale=scale, factor=factor, label=name)
            assert not buffers["grad"].check().any()
            if self.low is not None:
                assert torch.equal(buffers["low"].check(), buffers["param"].tensor.to(self.low))


@each(
    "dtypes",
    [(F32, None, F32), (BF16, BF16, F32), (F16, F16, F32), (F64, None, F64), (F32, BF16, F32), (F32, F32, F64)],
)
@pytest.mark.parametrize("length", [1, 7, 5000])
@pytest.mark.parametrize("max_grad_norm", [math.inf, 0.5])
def test_adamw(
    compiler: Compiler, max_grad_norm: float, length: int, dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype]
) -> None:
    AdamWCase(length, *dtypes, max_grad_norm=max_grad_norm).check(compiler)


@pytest.mark.parametrize(
    "offsets", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (3, 3, 3, 3)], ids=str
)
@pytest.mark.parametrize("length", [2, 1037])
def test_adamw_over_misaligned_buffers(compiler: Compiler, length: int, offsets: tuple[int, int, int, int]) -> None:
    AdamWCase(length, BF16, BF16, offsets=offsets).check(compiler, steps=2)


def test_adamw_with_float32_settings(compiler: Compiler) -> None:
    AdamWCase(100, settings=F32, max_grad_norm=0.5).check(compiler)


@each("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("length", [1, 4095, 20000])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_sum_of_squares(compiler: Compiler, blocks: int, length: int, dtype: torch.dtype) -> None:
    grad = Guarded(torch.randn(length).to(dtype), 1)
    sums = torch.full((3,), math.nan, dtype=F64)
    AdamWCase(length, dtype, blocks=blocks).sum_of_squares(compiler, grad, sums, 1)
    assert sums.isnan().tolist() == [True, False, True]
    assert_close(sums[1], (grad.tensor.double() ** 2).sum(), dtype=real_of(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
def test_a_norm_that_is_not_finite_skips_the_step(compiler: Compiler, counted: bool, value: float) -> None:
    case = AdamWCase(3001, BF16, BF16, offsets=(1, 1, 1, 1))
    program, buffers = case.program(compiler), case.buffers()
    for name in ("exp_avg", "exp_avg_sq", "low"):
        buffers[name].tensor.copy_(torch.rand(case.length))
    buffers["grad"].tensor.copy_(torch.randn(case.length))
    buffers["grad"].tensor[-1] = value
    before = {name: buffer.tensor.clone() for name, buffer in buffers.items()}
    settings = torch.tensor([0.01, 0.8, 0.95, 1e-6, 0.1, 1.0], dtype=F64)
    sums, count, skipped = torch.zeros(1, dtype=F64), torch.tensor(5.0), torch.tensor(2)
    case.sum_of_squares(compiler, buffers["grad"], sums, 0)
    case.step(program, buffers, settings, sums, count, skipped if counted else None)
    assert (float(count), int(skipped)) == (5.0, 3 if counted else 2)
    for name in ("param", "exp_avg", "exp_avg_sq", "low"):
        assert torch.equal(buffers[name].check(), before[name]), name
    assert not buffers["grad"].check().any()


# Similarity


class Similarities:
    """The launches of cuda.rs."""

    def __init__(
        self, compiler: Compiler, a: torch.dtype, b: torch.dtype, real: torch.dtype, mutation: Any = None
    ) -> None:
        self.real = real
        self._compiler, self._mutation = compiler, mutation
        self._program = self._of(a, b)

    def _of(self, a: torch.dtype, b: torch.dtype) -> Program:
        defines = {"REAL": self.real, "EMBEDDING_A": a, "EMBEDDING_B": b}
        return self._compiler.program("similarity", defines, self._mutation)

    def pairs(
        self, a: Guarded, b: Guarded, result: int = 0, *, one: bool = False, blocks: int = 3, together: bool = False
    ) -> torch.Tensor:
        rows, dim = a.tensor.shape
        values = unwritten((rows,), F64)
        program = self._of(a.tensor.dtype, b.tensor.dtype)
        program.run("paired", pack(a, b, values, rows, dim, 0 if one else dim, int(together), result), (blocks, 1))
        return values.check()

    def cross_mean(self, a: Guarded, b: Guarded, blocks: int = 3) -> torch.Tensor:
        rows, dim = b.tensor.shape
        norms = Guarded(self.pairs(b, b, 2))
        partials, mean = unwritten((blocks, dim), F64), unwritten((dim,), self.real)
        columns = -(-dim // 256)
        program = self._of(b.tensor.dtype, b.tensor.dtype)
        program.run("direction_mean", pack(b, norms, partials, rows, dim), (blocks, columns))
        program.run("sum_rows", pack(partials, mean, blocks, dim), (columns, 1))
        partials.check()
        return self.pairs(a, Guarded(mean.check()), 1, one=True)

    def cross_max(self, a: Guarded, b: Guarded, splits: int = 2, *, backwards: bool = False) -> torch.Tensor:
        (rows, dim), others = a.tensor.shape, b.tensor.shape[0]
        best = unwritten((splits, rows), F64)
        a_norms, b_norms = Guarded(self.pairs(a, a, 2)), Guarded(self.pairs(b, b, 2))
        problem = pack(a, b, a_norms, b_norms, best, rows, others, dim)
        self._program.run("cross_max", problem, (-(-rows // 64), splits), backwards=backwards)
        return best.check().amax(0)


def embeddings(rows: int, dim: int, dtype: torch.dtype, offset: int = 0) -> Guarded:
    return Guarded((torch.randn(rows, dim) + 0.5).to(dtype), offset)


def assert_scores_close(ours: torch.Tensor, expected: Any, real: torch.dtype) -> None:
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-14 if real == F64 else 3e-7)


@each("dtypes", PAIRS)
@pytest.mark.parametrize("shape", [(1, 1), (9, 13), (20, 64), (3, 1537)], ids=str)
@pytest.mark.parametrize("together", [False, True], ids=["warps", "blocks"])
def test_paired_similarity(
    compiler: Compiler, together: bool, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for offsets in ((0, 0), (1, 1), (0, 1)):
        a, b = (embeddings(*shape, dtype, offset) for dtype, offset in zip(dtypes, offsets, strict=True))
        kernels = Similarities(compiler, *dtypes, real_of(*dtypes))
        expected = references.similarity(a.tensor.double(), b.tensor.double())
        assert_scores_close(kernels.pairs(a, b, together=together), expected, kernels.real)


@each("dtypes", [*ALONE, (BF16, F32)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 13), (3, 200, 64), (130, 70, 33), (2, 3, 300)], ids=str)
def test_cross_similarity(
    compiler: Compiler, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    rows, others, dim = shape
    a, b = embeddings(rows, dim, dtypes[0], 1), embeddings(others, dim, dtypes[1])
    kernels = Similarities(compiler, *dtypes, real_of(*dtypes))
    expected = references.cross_similarity(a.tensor.double(), b.tensor.double())
    assert_scores_close(kernels.cross_mean(a, b), expected.mean(1), kernels.real)
    for splits, backwards in ((1, False), (1, True), (min(3, -(-others // 64)), False)):
        ours = kernels.cross_max(a, b, splits, backwards=backwards)
        assert_scores_close(ours, expected.max(1), kernels.real)


@pytest.mark.parametrize("dim", [512, 3000, 65536])
@pytest.mark.parametrize("kind", ["equal", "growing", "positive", "random"])
def test_the_error_of_cross_similarity_has_a_bound(compiler: Compiler, kind: str, dim: int) -> None:
    # Numbers of one sign, whose rounding errors may all point the same way.
    rows = {
        "equal": torch.full((2, dim), 0.1),
        "growing": torch.linspace(1e-3, 3, dim).repeat(2, 1),
        "positive": torch.rand(2, dim),
        "random": torch.randn(2, dim),
    }[kind]
    a, b = Guarded(rows), Guarded(rows)
    ours = Similarities(compiler, F32, F32, F32).cross_max(a, b, 1)
    exact = references.cross_similarity(rows.double(), rows.double()).max(1)
    # (DEPTH + FOLD + 6) u of a cosine, of which a similarity has half; the norms' own error is less than 10 u.
    assert np.abs(ours.numpy() - exact).max() <= (16 + 8 + 6 + 10) * 2**-24 / 2


def test_pairs_of_rows_are_compared_without_float64() -> None:
    source = source_of("similarity")
    kernel = source[source.index(" cross_max(const") :]
    pairs = kernel[: kernel.index("bests[y + i * SIDE]")]
    assert "f64" not in pairs.replace("cross_max(const CrossMax work)", "")


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_row_without_direction_is_nan(compiler: Compiler, value: float) -> None:
    kernels = Similarities(compiler, F32, F32, F32)
    a, b = embeddings(5, 40, F32), embeddings(70, 40, F32)
    a.tensor[3] = value
    for ours in (kernels.pairs(a, embeddings(5, 40, F32)), kernels.cross_mean(a, b), kernels.cross_max(a, b)):
        assert ours.isnan().tolist() == [False, False, False, True, False]
    assert kernels.cross_max(b, a).isnan().all()
    assert kernels.cross_mean(b, a).isnan().all()


@pytest.mark.parametrize("size", [1e30, 1e-21, 1e-30])
def test_squares_beyond_float32_are_nan_and_right_in_float64(compiler: Compiler, size: float) -> None:
    a, b = embeddings(4, 70, F32), embeddings(4, 70, F32)
    a.tensor.mul_(size)
    narrow, wide = (Similarities(compiler, F32, F32, real) for real in (F32, F64))
    expected = references.cross_similarity(a.tensor.double(), b.tensor.double())
    scores = {"pairs": expected.diagonal(), "cross_mean": expected.mean(1), "cross_max": expected.max(1)}
    for name, reference in scores.items():
        assert getattr(narrow, name)(a, b).isnan().all(), name
        assert_scores_close(getattr(wide, name)(a, b), reference, F64)


# What these tests are worth: each refuses a wrong kernel.

Check = Callable[[Compiler, tuple[str, str]], None]


def _adamw(compiler: Compiler, mutation: tuple[str, str]) -> None:
    AdamWCase(1037, BF16, BF16, max_grad_norm=0.5).check(compiler, mutation)


def _loss(compiler: Compiler, mutation: tuple[str, str]) -> None:
    LossCase((2, 3, 37, 61), mask_shape=(2, 1, 37, 61), mask_normalize=True, weighted=True).check(compiler, mutation)
    LossCase((2, 9000)).check(compiler, mutation)


def _noising(compiler: Compiler, mutation: tuple[str, str]) -> None:
    check_noising(compiler, (3, 4609), mutation=mutation)
    check_noising(compiler, (2, 4096), offsets=(0, 1, 0, 0), mutation=mutation)


def _similarity(compiler: Compiler, mutation: tuple[str, str]) -> None:
    kernels = Similarities(compiler, F32, F32, F32, mutation)
    a, b = embeddings(70, 40, F32), embeddings(70, 40, F32)
    expected = references.cross_similarity(a.tensor, b.tensor)
    assert_scores_close(kernels.pairs(a, b), expected.diagonal(), F32)
    assert_scores_close(kernels.cross_mean(a, b), expected.mean(1), F32)
    for backwards in (False, True):
        assert_scores_close(kernels.cross_max(a, b, backwards=backwards), expected.max(1), F32)


MUTATIONS: list[tuple[Check, str, str]] = [
    (_loss, "sum += masked * error;", "sum += masked;"),
    (_loss, "narrow(scale * masked, grad.values[i]);", "narrow(scale * error, grad.values[i]);"),
    (_loss, "mask_mean == 0.0 ? 0.0 : weight", "mask_mean == 0.0 ? 0.0 : 1.0"),
    (_loss, "(term.mask_per_sample ? sample * term.row : 0) + start", "start"),
    (_loss, "i < head ? i : packs * N + i", "i < head ? i : packs * N + i + 1"),
    (_loss, "constexpr u32 CHUNK = THREADS * UNROLL * N;", "constexpr u32 CHUNK = THREADS * UNROLL * N + 4;"),
    (_loss, "sums[threadIdx.x / WARP] = value;\n    __syncthreads();", "sums[threadIdx.x / WARP] = value;"),
    (_noising, "-rates.sigma", "rates.sigma"),
    (_noising, "copy * work.batch * work.row + at", "copy * work.batch + at"),
    (_noising, "pointer == nullptr || before_packs<N>(pointer) == head", "true"),
    (_adamw, "1.0 - pow(beta2, t)", "1.0 - beta2"),
    (_adamw, "limit / (norm + 1e-6)", "limit / (sum + 1e-6)"),
    (_adamw, "param.values[i] * step.decay", "param.values[i]"),
    (_adamw, "store<N>(grad + at, zeros);", ""),
    (_adamw, "if (low_precision) store<N>(low_precision + at, low);", ""),
    (_similarity, "sums[2] += x * y;", "sums[2] += x;"),
    (_similarity, "if (!(value <= best[i]) && best[i] == best[i]) best[i] = value;", "best[i] = value;"),
    (_similarity, "work.b_rows, start, work.dim);\n            __syncthreads();", "work.b_rows, start, work.dim);"),
    (_similarity, "column >= work.dim", "column > work.dim"),
]


@pytest.mark.parametrize(("check", "old", "new"), MUTATIONS)
def test_a_wrong_kernel_is_found(compiler: Compiler, check: Check, old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check(compiler, (old, new))
