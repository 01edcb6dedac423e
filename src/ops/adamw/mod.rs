//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) with gradient-norm clipping over flat buffers.

mod cpu;
mod cuda;

use tch::{Device, Kind, Tensor};

use self::cpu::{Buffers, Step};
pub use self::cuda::variant;
use super::{queue_of, threads};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{
    address, check_contiguous, check_dense, check_float, check_shape, dtype_name, elements, elements_mut,
};

const OP: &str = "adamw";

/// The settings of one step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Multiplies the gradient first: clipping and unscaling.
    pub grad_scale: f64,
}

/// The flat buffers, contiguous and of one length.
#[derive(Debug)]
pub struct FlatBuffers<'t> {
    /// Weights, float32 or float64.
    pub param: &'t mut Tensor,
    /// Gradients, of any float dtype; zero afterwards.
    pub grad: &'t mut Tensor,
    /// First moments, in the weights' dtype.
    pub exp_avg: &'t mut Tensor,
    /// Second moments, in the weights' dtype.
    pub exp_avg_sq: &'t mut Tensor,
    /// A copy of the weights in a lower precision.
    pub low_precision: Option<&'t mut Tensor>,
    /// The number of steps taken, a 0-dim float32 tensor; raised by one.
    pub step: &'t mut Tensor,
}

/// The L2 norm of a flat gradient buffer, accumulated in f64 over f32 lanes.
pub fn grad_norm(grad: &Tensor) -> Result<f64> {
    let kind = check_float(OP, "grad", grad, Device::Cpu)?;
    check_contiguous(OP, "grad", grad)?;
    let grad = elements(OP, grad)?;
    let sum = match kind {
        Kind::Double => cpu::sum_of_squares::<f64>(OP, threads(), grad)?,
        _ => cpu::sum_of_squares::<f32>(OP, threads(), grad)?,
    };
    Ok(sum.sqrt())
}

/// One step in place:
///
/// g = grad_scale * grad; p = p (1 - lr weight_decay); m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
/// p = p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps); grad = 0
pub fn adamw(buffers: FlatBuffers, settings: AdamW) -> Result<()> {
    let FlatBuffers { param, grad, exp_avg, exp_avg_sq, low_precision, .. } = &buffers;
    let kind = check_buffers(param, grad, [exp_avg, exp_avg_sq], low_precision.as_deref(), Device::Cpu)?;
    check_settings(&settings)?;
    check_step(buffers.step)?;
    match kind {
        Kind::Double => run::<f64>(buffers, settings),
        _ => run::<f32>(buffers, settings),
    }
}

/// The buffers of a step on a GPU, and what the step reads there, so that the host neither waits nor is waited for.
#[derive(Debug)]
pub struct GpuStep<'t> {
    /// Weights, float32 or float64.
    pub param: &'t Tensor,
    /// Gradients, of any float dtype; zero afterwards.
    pub grad: &'t Tensor,
    /// First moments, in the weights' dtype.
    pub exp_avg: &'t Tensor,
    /// Second moments, in the weights' dtype.
    pub exp_avg_sq: &'t Tensor,
    /// A copy of the weights in a lower precision.
    pub low_precision: Option<&'t Tensor>,
    /// lr, beta1, beta2, eps, weight_decay and max_grad_norm (infinite: no clipping); float32, or float64, in which
    /// 1 - beta2 keeps its digits.
    pub settings: &'t Tensor,
    /// The sums of squares of all flat buffers, [K], float64.
    pub sums: &'t Tensor,
    /// The number of steps taken, 0-dim float32; raised by one.
    pub step: &'t Tensor,
    /// The number of steps skipped, 0-dim int64; raised by one where the norm is not finite.
    pub skipped: Option<&'t Tensor>,
}

/// sums[index] = sum grad^2 on a GPU, in f64 over f32 packs; repeatable bit for bit.
pub fn sum_of_squares_on_gpu(grad: &Tensor, sums: &Tensor, index: i64, stream: u64) -> Result<()> {
    let (queue, on) = queue_of(OP, "grad", grad, stream)?;
    check_float(OP, "grad", grad, on)?;
    check_contiguous(OP, "grad", grad)?;
    check_sums(sums, on)?;
    if !(0..sums.numel() as i64).contains(&index) {
        return Err(CatError::value(OP, "index", format!("in 0..{}", sums.numel()), index));
    }
    cuda::sum_of_squares(&queue, on, grad, address(OP, sums)? + 8 * index as u64)
}

/// As [`adamw`], on a GPU, with grad_scale = min(1, max_grad_norm / (norm + 1e-6)) and norm = sqrt(sum(sums)).
///
/// Where the norm is not finite, weights, moments and step count stay as they are; the gradients become zero.
pub fn adamw_on_gpu(step: &GpuStep, stream: u64) -> Result<()> {
    let (queue, on) = queue_of(OP, "param", step.param, stream)?;
    check_buffers(step.param, step.grad, [step.exp_avg, step.exp_avg_sq], step.low_precision, on)?;
    let kind = check_float(OP, "settings", step.settings, on)?;
    if !matches!(kind, Kind::Float | Kind::Double) {
        let expected = "float32 or float64";
        return Err(CatError::Dtype { op: OP, argument: "settings", expected, got: dtype_name(kind) });
    }
    check_shape(OP, "settings", step.settings, &[6])?;
    check_contiguous(OP, "settings", step.settings)?;
    check_sums(step.sums, on)?;
    check_count("step", step.step, Kind::Float, on)?;
    if let Some(skipped) = step.skipped {
        check_count("skipped", skipped, Kind::Int64, on)?;
    }
    cuda::adamw(&queue, on, step)
}

fn check_sums(sums: &Tensor, on: Device) -> Result<()> {
    const NAME: &str = "sums";
    let kind = check_float(OP, NAME, sums, on)?;
    if kind != Kind::Double {
        return Err(CatError::Dtype { op: OP, argument: NAME, expected: "float64", got: dtype_name(kind) });
    }
    if sums.dim() != 1 || sums.numel() == 0 {
        return Err(CatError::shape(OP, NAME, "[K] with K >= 1", &sums.size()));
    }
    check_contiguous(OP, NAME, sums)
}

fn run<T: crate::cpu::Real>(buffers: FlatBuffers, settings: AdamW) -> Result<()> {
    let typed = |tensor| {
        let elements = elements_mut(OP, tensor)?;
        elements.typed::<T>().ok_or_else(|| CatError::torch_message(OP, "a state buffer changed its dtype"))
    };
    let slots = elements_mut(OP, buffers.step)?.typed::<f32>();
    let slots = slots.ok_or_else(|| CatError::torch_message(OP, "the step count changed its dtype"))?;
    // SAFETY: the only use of the count.
    let count = unsafe { slots.range(0, 1) };
    let buffers = Buffers {
        param: typed(buffers.param)?,
        grad: elements_mut(OP, buffers.grad)?,
        exp_avg: typed(buffers.exp_avg)?,
        exp_avg_sq: typed(buffers.exp_avg_sq)?,
        low_precision: buffers.low_precision.map(|tensor| elements_mut(OP, tensor)).transpose()?,
    };
    let AdamW { lr, beta1, beta2, eps, weight_decay, grad_scale } = settings;
    let exponent = f64::from(count[0]) + 1.0;
    let step = Step {
        grad_scale,
        decay: 1.0 - lr * weight_decay,
        beta1,
        beta2,
        step_size: lr / (1.0 - beta1.powf(exponent)),
        correction2_sqrt: (1.0 - beta2.powf(exponent)).sqrt(),
        eps,
    };
    cpu::adamw(OP, threads(), &buffers, step)?;
    count[0] += 1.0;
    Ok(())
}

/// Checks the flat buffers, contiguous and of one length; returns the dtype of the weights.
fn check_buffers(
    param: &Tensor,
    grad: &Tensor,
    moments: [&Tensor; 2],
    low_precision: Option<&Tensor>,
    on: Device,
) -> Result<Kind> {
    let kind = check_float(OP, "param", param, on)?;
    if !matches!(kind, Kind::Float | Kind::Double) {
        let expected = "float32 or float64 (lower precisions are a copy)";
        return Err(CatError::Dtype { op: OP, argument: "param", expected, got: dtype_name(kind) });
    }
    let state = [("exp_avg", moments[0]), ("exp_avg_sq", moments[1])];
    for (name, tensor) in state {
        let got = check_float(OP, name, tensor, on)?;
        if got != kind {
            let expected = "the dtype of `param`";
            return Err(CatError::Dtype { op: OP, argument: name, expected, got: dtype_name(got) });
        }
    }
    let low_precision = low_precision.map(|tensor| ("low_precision", tensor));
    for (name, tensor) in [("grad", grad)].into_iter().chain(low_precision) {
        check_float(OP, name, tensor, on)?;
    }
    let shape = param.size();
    for (name, tensor) in [("param", param), ("grad", grad)].into_iter().chain(state).chain(low_precision) {
        check_shape(OP, name, tensor, &shape)?;
        check_contiguous(OP, name, tensor)?;
    }
    Ok(kind)
}

/// Checks that a count is a 0-dim tensor of that dtype.
fn check_count(argument: &'static str, tensor: &Tensor, kind: Kind, on: Device) -> Result<()> {
    check_dense(OP, argument, tensor, on)?;
    let got = tensor.f_kind().during(OP)?;
    if got != kind {
        let expected = if kind == Kind::Float { "float32" } else { "int64" };
        return Err(CatError::Dtype { op: OP, argument, expected, got: dtype_name(got) });
    }
    check_shape(OP, argument, tensor, &[])
}

fn check_step(step: &Tensor) -> Result<()> {
    const NAME: &str = "step";
    check_count(NAME, step, Kind::Float, Device::Cpu)?;
    let count = step.f_double_value(&[]).during(OP)?;
    if count >= 0.0 && count.is_finite() {
        Ok(())
    } else {
        Err(CatError::value(OP, NAME, "a count >= 0", count))
    }
}

fn check_settings(settings: &AdamW) -> Result<()> {
    let AdamW { lr, beta1, beta2, eps, weight_decay, grad_scale } = *settings;
    let unit = "in [0, 1)";
    let positive = "a finite number >= 0";
    let is_positive = |value: f64| value >= 0.0 && value.is_finite();
    for (name, value, fits, expected) in [
        ("lr", lr, is_positive(lr), positive),
        ("beta1", beta1, (0.0..1.0).contains(&beta1), unit),
        ("beta2", beta2, (0.0..1.0).contains(&beta2), unit),
        ("eps", eps, is_positive(eps), positive),
        ("weight_decay", weight_decay, is_positive(weight_decay), positive),
        ("grad_scale", grad_scale, is_positive(grad_scale), positive),
    ] {
        if !fits {
            return Err(CatError::value(OP, name, expected, value));
        }
    }
    Ok(())
}
