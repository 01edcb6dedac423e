"""The operations on a GPU, against float64 references on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.gpu.meter import without_tf32
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora

import cat_rs
from cat_rs._native import _core
from cat_rs.errors import DeviceError, InvalidValueError
from cat_rs.ops.adamw import adamw_step, sum_of_squares
from cat_rs.ops.cat_loss import student_loss
from cat_rs.ops.lora_up import lora_up_
from cat_rs.ops.noising import noising
from cat_rs.ops.operator import stream_of
from tests import references
from tests.tolerances import assert_close, max_abs

pytestmark = [
    pytest.mark.gpu,
    # PyTorch makes its context when a library is first called, and says so.
    pytest.mark.filterwarnings("ignore:.*no current CUDA context:UserWarning"),
]
if not torch.cuda.is_available():
    pytest.skip("there is no NVIDIA GPU that PyTorch can use", allow_module_level=True)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}
NAMES = ("model_pred", "target", "model_pred_no_trigger", "base_pred")
PREDICTIONS = NAMES[::2]
# One element more than 32 bits count.
HUGE = 2**31 + 4097

Place = Callable[[torch.Tensor], torch.Tensor]


def by_id(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in table.items()]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element behind an aligned address."""
    memory = tensor.new_empty(tensor.numel() + 1)
    view = memory[1:].view(tensor.shape)
    return view.copy_(tensor)


LAYOUTS: dict[str, Place] = {
    "aligned": lambda tensor: tensor,
    "misaligned": misaligned,
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """No TF32."""
    with without_tf32():
        yield


@contextmanager
def busy_stream() -> Iterator[None]:
    """A stream of its own that is far behind: what runs on another stream would not find what was written on it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.fixture(params=["default-stream", "other-stream", "last-device"])
def _where(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on the default stream, on another one, and on the last device."""
    if request.param == "other-stream":
        with busy_stream():
            yield
    elif request.param == "last-device":
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU")
        # Tensors are made there, while the first device stays the current one.
        with torch.device("cuda", torch.cuda.device_count() - 1):
            yield
    else:
        yield


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device of the test."""
    default = torch.get_default_device()
    return tensor.to(default if default.type == "cuda" else "cuda")


def random(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, device="cpu").to(dtype)


def loss_case(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], layout: Place) -> dict[str, torch.Tensor]:
    case = {name: layout(on_gpu(random(*shape, dtype=dtype))) for name, dtype in zip(NAMES, dtypes, strict=True)}
    for name in PREDICTIONS:
        case[name].requires_grad_()
    return case


def check_loss(case: dict[str, torch.Tensor], upstream: float = 1.0, **options: Any) -> None:
    parts = cat_rs.cat_loss(**case, **options, return_parts=True)
    (parts.total * upstream).backward()
    twins = {name: tensor.detach().cpu().double() for name, tensor in case.items()}
    for name in PREDICTIONS:
        twins[name].requires_grad_()
    options = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    expected = references.cat_loss(**twins, **options)
    (expected.total * upstream).backward()
    for name in ("total", "diffusion", "cat"):
        value = getattr(parts, name)
        assert value.device == case["target"].device
        assert_close(value.cpu(), getattr(expected, name), label=name)
    for name in PREDICTIONS:
        gradient = case[name].grad
        assert gradient is not None
        assert gradient.dtype == case[name].dtype
        # Rounded once in the kernel and once more where the loss was multiplied.
        assert_close(gradient.cpu(), twins[name].grad, factor=1 if upstream == 1 else 2, label=f"gradient of {name}")


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("layout", by_id(LAYOUTS))
@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7, 11), (4, 4, 64, 64), (2, 4, 333, 257)], ids=str)
def test_cat_loss(shape: tuple[int, ...], dtype: torch.dtype, layout: Place) -> None:
    weights = on_gpu(torch.rand(shape[0], device="cpu") + 0.1)
    check_loss(loss_case(shape, (dtype,) * 4, layout), cat_factor=0.7, sample_weight=weights)


@pytest.mark.parametrize(
    "dtypes", [(BF16, F32, BF16, F32), (F16, F32, F16, F16), (F32, BF16, F32, F16), (F64, F16, F32, BF16)], ids=str
)
def test_cat_loss_of_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    check_loss(loss_case((2, 4, 65, 64), dtypes, LAYOUTS["aligned"]), cat_factor=1.3)


@pytest.mark.parametrize("mask_shape", [(2, 1, 65, 64), (1, 1, 65, 64), (2, 4, 65, 64), (1, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("mask_normalize", [False, True])
@pytest.mark.parametrize("mask_dtype", [torch.bool, F32, BF16], ids=str)
def test_cat_loss_with_masks(mask_dtype: torch.dtype, mask_normalize: bool, mask_shape: tuple[int, ...]) -> None:
    mask = on_gpu((torch.rand(mask_shape) > 0.4).to(mask_dtype))
    mask[0, 0] = 0
    case = loss_case((2, 4, 65, 64), (BF16,) * 4, LAYOUTS["aligned"])
    check_loss(case, mask=mask, mask_normalize=mask_normalize)


@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize("upstream", [0.25, 3.0, 65536.0])
def test_the_losss_own_gradient_scales_the_gradients(upstream: float, dtype: torch.dtype) -> None:
    check_loss(loss_case((2, 4, 33, 31), (dtype,) * 4, LAYOUTS["aligned"]), upstream)


def test_a_second_backward_equals_the_first() -> None:
    case = loss_case((2, 4, 33, 31), (F32,) * 4, LAYOUTS["aligned"])
    total = cat_rs.cat_loss(**case)
    first = torch.autograd.grad(total, [case[name] for name in PREDICTIONS], retain_graph=True)
    second = torch.autograd.grad(total, [case[name] for name in PREDICTIONS])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_cat_loss_is_repeatable_bit_for_bit() -> None:
    case = loss_case((3, 4, 257, 255), (BF16,) * 4, LAYOUTS["aligned"])
    assert len({cat_rs.cat_loss(**case).item() for _ in range(20)}) == 1


def test_tensors_on_two_devices_are_an_error() -> None:
    case = loss_case((2, 3), (F32,) * 4, LAYOUTS["aligned"])
    with pytest.raises(DeviceError, match="`target` must be on cuda:0, got a tensor on the CPU"):
        cat_rs.cat_loss(**{**case, "target": case["target"].cpu()})


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("preserve", [True, False])
def test_student_loss(preserve: bool) -> None:
    student, target, base = (on_gpu(random(rows, 4, 64, 64, dtype=BF16)) for rows in (4 if preserve else 2, 2, 2))
    factors = on_gpu(torch.tensor([0.7, 0.25], device="cpu"))
    arguments = (student, target, base if preserve else None, *[None] * 4, *factors)
    loss, parts, grad = student_loss(*arguments)
    twin = student.cpu().double().requires_grad_()
    wide_target, wide_base = target.cpu().double(), base.cpu().double()
    zero = torch.zeros_like(wide_base)
    expected = references.cat_loss(
        twin[:2], wide_target, twin[2:] if preserve else zero, wide_base if preserve else zero, cat_factor=0.7
    )
    (0.25 * expected.total).backward()
    assert_close(loss.cpu(), expected.total)
    assert_close(parts.cpu(), torch.stack([expected.diffusion, expected.cat]))
    assert_close(grad.cpu(), twin.grad)


def test_small_errors_keep_their_float16_gradients() -> None:
    errors = on_gpu((1e-3 * (torch.rand(8, 4, 128, 128) + 0.5)).half())
    zero = torch.zeros_like(errors[:4])
    scale = on_gpu(torch.tensor(2.0**16, dtype=F64, device="cpu"))
    gradient = student_loss(errors, zero, zero, None, None, 0.7, scale)[2][4:].double()
    exact = 2 * 0.7 * 2.0**16 / gradient.numel() * errors[4:].double()
    assert gradient.all()
    assert ((gradient - exact) / exact).abs().max() <= 2e-3


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("layout", by_id(LAYOUTS))
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32), (F64, F16)], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4, 65, 33), (2, 4, 64, 64)], ids=str)
def test_noising(
    shape: tuple[int, ...], prediction_type: str, dtypes: tuple[torch.dtype, torch.dtype], layout: Place
) -> None:
    latents, noise = (layout(on_gpu(random(*shape, dtype=dtype))) for dtype in dtypes)
    signal, sigma = (on_gpu(torch.rand(shape[0], device="cpu")) for _ in range(2))
    noisy, target = noising(latents, noise, signal, sigma, prediction_type, copies=2)
    inputs = [tensor.cpu() for tensor in (latents, noise, signal, sigma)]
    expected, expected_target = references.noising(*inputs, prediction_type)
    scale = max_abs(latents) + max_abs(noise)
    for half in noisy.cpu().chunk(2):
        assert_close(half, expected, scale=scale)
    assert_close(target.cpu(), expected_target, scale=scale)


class GpuAdamW:
    """The kernels' steps over one flat buffer, and clip_grad_norm_ and torch.optim.AdamW in float64."""

    def __init__(self, length: int, dtype: torch.dtype, layout: Place, max_grad_norm: float = math.inf) -> None:
        real = dtype if dtype == F64 else F32
        self.param, self.grad = layout(on_gpu(random(length, dtype=real))), layout(on_gpu(random(length, dtype=dtype)))
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.param) for _ in range(2))
        self.low = None if dtype == real else layout(self.param.to(dtype))
        self.settings = on_gpu(torch.tensor([0.01, 0.8, 0.95, 1e-6, 0.1, max_grad_norm], dtype=F64, device="cpu"))
        self.sums = on_gpu(torch.zeros(1, dtype=F64, device="cpu"))
        self.count = on_gpu(torch.zeros((), device="cpu"))
        self.skipped = on_gpu(torch.zeros((), dtype=torch.int64, device="cpu"))
        self.twin = torch.nn.Parameter(self.param.cpu().double())
        self.reference = torch.optim.AdamW([self.twin], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        self.max_grad_norm = max_grad_norm

    def step(self) -> None:
        sum_of_squares(self.grad, self.sums, 0)
        adamw_step(
            self.param,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self.low,
            settings=self.settings,
            sums=self.sums,
            step=self.count,
            skipped=self.skipped,
        )

    def step_reference(self, grad: torch.Tensor) -> None:
        self.twin.grad = grad.cpu().double()
        torch.nn.utils.clip_grad_norm_([self.twin], self.max_grad_norm)
        self.reference.step()

    def check(self) -> None:
        dtype = F32 if self.grad.dtype != F64 else F64
        state = self.reference.state[self.twin]
        tensors = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        for name, ours, expected in [
            ("param", self.param, self.twin),
            *((n, t, state[n]) for n, t in tensors.items()),
        ]:
            assert_close(ours.cpu(), expected, dtype=dtype, factor=8, scale=max_abs(expected), label=name)
        if self.low is not None:
            assert torch.equal(self.low, self.param.to(self.low.dtype))
        assert not self.grad.any()


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("layout", by_id({name: LAYOUTS[name] for name in ("aligned", "misaligned")}))
@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize("length", [1, 1000, 300_007])
def test_adamw(length: int, dtype: torch.dtype, layout: Place) -> None:
    ours = GpuAdamW(length, dtype, layout, max_grad_norm=0.5)
    for size in (0.001, 1.0, 0.1):
        grad = (size * random(length)).to(dtype)
        ours.grad.copy_(grad)
        ours.step()
        ours.step_reference(grad)
        ours.check()
    assert (int(ours.count), int(ours.skipped)) == (3, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_skips_the_step(value: float) -> None:
    ours = GpuAdamW(100_001, BF16, LAYOUTS["aligned"])
    ours.grad[-1] = value
    before = ours.param.clone()
    ours.step()
    assert torch.equal(ours.param, before)
    assert not ours.grad.any()
    assert (int(ours.count), int(ours.skipped)) == (0, 1)


def test_a_graph_replays_steps_and_losses_with_new_numbers() -> None:
    ours = GpuAdamW(10_000, BF16, LAYOUTS["aligned"])
    student, target = on_gpu(random(4, 3, 16)), on_gpu(random(2, 3, 16))
    factors = on_gpu(torch.tensor([0.5, 1.0]))

    def work() -> torch.Tensor:
        total, _, _ = student_loss(student, target, target, *[None] * 4, *factors)
        ours.step()
        return total

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = work()
    start = ours.count.item()
    losses = []
    for cat_factor in (0.0, 2.0):
        factors[0] = cat_factor
        ours.grad.copy_(on_gpu(random(10_000)))
        graph.replay()
        losses.append(total.item())
        assert not ours.grad.any()
    assert ours.count.item() == start + 2
    first, second = student.cpu().double().chunk(2)
    diffusion, cat = (((half - target.cpu().double()) ** 2).mean() for half in (first, second))
    assert losses == pytest.approx([float(diffusion), float(diffusion + 2 * cat)], rel=1e-6)


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("layout", by_id(LAYOUTS))
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (1000, 768), (3, 20_001)], ids=str)
def test_similarity(shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], layout: Place) -> None:
    a, b = (layout(on_gpu((random(*shape) + 0.5).to(dtype))) for dtype in dtypes)
    tolerance = 1e-13 if F64 in dtypes else 5e-7
    wide = [tensor.cpu().double().numpy() for tensor in (a, b)]
    ours = cat_rs.similarity(a, b)
    assert ours.device == a.device
    np.testing.assert_allclose(ours.cpu().numpy(), references.similarity(*wide), rtol=0, atol=tolerance)
    expected = references.cross_similarity(*wide)
    for reduce in ("mean", "max"):
        ours = cat_rs.cross_similarity(a, b, reduce).cpu()
        np.testing.assert_allclose(ours.numpy(), getattr(expected, reduce)(axis=1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_row_without_direction_is_an_error(value: float) -> None:
    a, b = on_gpu(random(9, 40)), on_gpu(random(9, 40))
    b[4] = value
    for call in (cat_rs.similarity, cat_rs.cross_similarity):
        with pytest.raises(InvalidValueError, match="`b` must be finite with no zero row, got row 4"):
            call(a, b)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_beyond_float32(size: float) -> None:
    a, b = on_gpu(size * random(9, 400)), on_gpu(random(9, 400))
    expected = references.cross_similarity(a.cpu(), b.cpu())
    np.testing.assert_allclose(cat_rs.similarity(a, b).cpu(), expected.diagonal(), rtol=0, atol=1e-6)
    for reduce in ("mean", "max"):
        ours = cat_rs.cross_similarity(a, b, reduce).cpu()
        np.testing.assert_allclose(ours, getattr(expected, reduce)(axis=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_lora_linear(dtype: torch.dtype) -> None:
    x, weight, bias = random(3, 17, 64, dtype=dtype), random(48, 64, dtype=dtype), random(48, dtype=dtype)
    lora_A, lora_B = random(8, 64, dtype=dtype), random(48, 8, dtype=dtype)
    trained = [tensor.cuda().requires_grad_() for tensor in (x, lora_A, lora_B)]
    twins = [tensor.double().requires_grad_() for tensor in (x, lora_A, lora_B)]
    y = cat_rs.lora_linear(trained[0], weight.cuda(), bias.cuda(), *trained[1:], 0.5)
    expected = references.lora_linear(twins[0], weight, bias, *twins[1:], 0.5)
    # Sums of up to 64 products of standard normals, in the order and precision of the library.
    assert_close(y.cpu(), expected, factor=8, scale=max_abs(expected))
    upstream = random(*y.shape, dtype=dtype)
    y.backward(upstream.cuda())
    expected.backward(upstream.double())
    for ours, twin in zip(trained, twins, strict=True):
        assert ours.grad is not None
        assert_close(ours.grad.cpu(), twin.grad, factor=8, scale=max_abs(twin.grad))


@pytest.mark.parametrize("channels_second", [False, True])
def test_lora_up(channels_second: bool) -> None:
    shape, narrow = ((2, 48, 5, 7), (2, 8, 5, 7)) if channels_second else ((3, 17, 48), (3, 17, 8))
    y, hidden, lora_B = random(*shape), random(*narrow), random(48, 8)
    expected = references.lora_up(y, hidden, lora_B, 0.5, channels_second)
    ours = lora_up_(y.cuda(), hidden.cuda(), lora_B.cuda(), 0.5, channels_second=channels_second)
    assert_close(ours.cpu(), expected, factor=8, scale=max_abs(expected))


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: torch.nn.Linear(48, 40), (2, 17, 48)),
    "conv": (lambda: torch.nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 7)),
    "conv-strided": (lambda: torch.nn.Conv2d(4, 9, 3, stride=2, bias=False), (1, 4, 9, 6)),
}


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)], ids=str
)
@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*row, id=name) for name, row in LAYERS.items()])
def test_layers_of_peft_are_fused(
    layer: Callable[[], torch.nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(layer()), config).to(dtype)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = param.data.to(adapter_dtype)
    x = random(*shape, dtype=dtype)
    upstream = torch.randn_like(model(x))

    def run(model: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
        leaf = x.detach().clone().requires_grad_()
        y = model(leaf)
        params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        grads = torch.autograd.grad(y, [leaf, *params.values()], upstream)
        return dict(zip(["y", "x", *params], [y, *grads], strict=True))

    exact = run(copy.deepcopy(model).double(), x.double(), upstream.double())
    model = model.to("cuda")
    assert len(cat_rs.patch_peft(model).fused) == 1
    for own in (lora.Linear, lora.Conv2d):
        monkeypatch.setattr(own, "forward", lambda *given: pytest.fail("PEFT's own forward ran"))
    for name, ours in run(model, x.to("cuda"), upstream.to("cuda")).items():
        assert_close(ours.cpu(), exact[name], dtype=dtype, factor=8, scale=max_abs(exact[name]), label=name)


# Sizes that 32 bits do not count


def needs_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"{gigabytes} GB of GPU memory are not free")


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Stretches of flat tensors, small enough to compute with in float64."""
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), 2**27):
        yield tuple(tensor[start : start + 2**27] for tensor in flat)


def test_cat_loss_past_2_31_elements() -> None:
    needs_memory(40)
    case = {name: torch.randn(1, HUGE, dtype=BF16, device="cuda") for name in NAMES}
    arguments = [case[name] for name in NAMES]
    total, parts, *grads = _core.cat_loss(
        *arguments, *[None] * 4, 0.5, False, 2.0**31, (True, True), stream_of(arguments[0])
    )
    sums = torch.zeros(2, dtype=F64, device="cuda")
    for index, factor in enumerate((1.0, 0.5)):
        for pred, target, grad in pieces(*arguments[2 * index : 2 * index + 2], grads[index]):
            error = pred.double() - target.double()
            sums[index] += (error**2).sum()
            expected = (2.0**32 * factor / HUGE * error).to(BF16)
            assert torch.allclose(grad.float(), expected.float(), rtol=2**-7, atol=0)
    assert_close(parts.cpu(), sums.cpu() / HUGE)
    assert_close(total.cpu(), (sums[0] + 0.5 * sums[1]).cpu() / HUGE)


def test_noising_past_2_31_elements() -> None:
    needs_memory(30)
    latents, noise = (torch.randn(1, HUGE, dtype=BF16, device="cuda") for _ in range(2))
    signal, sigma = torch.tensor([0.8], device="cuda"), torch.tensor([0.6], device="cuda")
    noisy, target = noising(latents, noise, signal, sigma, "v_prediction")
    for x, n, z, y in pieces(latents, noise, noisy, target):
        assert torch.allclose(z.float(), 0.8 * x.float() + 0.6 * n.float(), rtol=2**-7, atol=2**-7)
        assert torch.allclose(y.float(), 0.8 * n.float() - 0.6 * x.float(), rtol=2**-7, atol=2**-7)


def test_adamw_past_2_31_elements() -> None:
    needs_memory(60)
    param, exp_avg, exp_avg_sq = (torch.zeros(HUGE, device="cuda") for _ in range(3))
    grad = torch.randn(HUGE, dtype=BF16, device="cuda")
    low, kept = torch.empty_like(grad), grad.clone()
    settings = torch.tensor([0.01, 0.9, 0.999, 1e-15, 0.0, math.inf], dtype=F64, device="cuda")
    sums, count = torch.zeros(1, dtype=F64, device="cuda"), torch.zeros((), device="cuda")
    sum_of_squares(grad, sums, 0)
    adamw_step(param, grad, exp_avg, exp_avg_sq, low, settings=settings, sums=sums, step=count, skipped=None)
    square = 0.0
    for old, new, m, v, p, rounded in pieces(kept, grad, exp_avg, exp_avg_sq, param, low):
        square += float((old.double() ** 2).sum())
        assert not new.any()
        assert torch.allclose(m, 0.1 * old.float(), rtol=1e-5)
        assert torch.allclose(v, 0.001 * old.float() ** 2, rtol=1e-5)
        # The first step is lr in the direction of the gradient.
        assert torch.allclose(p, -0.01 * old.float().sign(), rtol=1e-3, atol=1e-5)
        assert torch.equal(rounded, p.to(BF16))
    assert float(sums) == pytest.approx(square, rel=1e-6)
