//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) with gradient-norm clipping over flat buffers.

mod cpu;
mod cuda;

use tch::{Device, Kind, Tensor};

use self::cpu::{Buffers, Step};
pub use self::cuda::variant;
use super::threads;
use crate::cpu::Real;
use crate::cuda::Stream;
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{
    address, check_contiguous, check_dense, check_float, check_shape, device_of, dtype_name, elements, elements_mut,
    kind_of, numbers,
};

const OP: &str = "adamw";

/// One step: flat buffers, contiguous and of one length, and the numbers that it reads, on the CPU or on one GPU, where
/// the host neither waits nor is waited for.
#[derive(Debug)]
pub struct AdamW<'t> {
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
    /// lr, beta1, beta2, eps, weight_decay and max_grad_norm (infinite: no clipping); float32, or float64, in which
    /// 1 - beta2 keeps its digits.
    pub settings: &'t Tensor,
    /// The sums of squares of all flat buffers, [K], float64.
    pub sums: &'t Tensor,
    /// The number of steps taken, 0-dim float32; raised by one.
    pub step: &'t mut Tensor,
    /// The number of steps skipped, 0-dim int64; raised by one where the norm is not finite.
    pub skipped: Option<&'t mut Tensor>,
    /// The raw handle of the GPU's stream.
    pub stream: u64,
}

/// sums[index] = sum grad^2, in f64 over f32 lanes; repeatable bit for bit.
pub fn sum_of_squares(grad: &Tensor, sums: &mut Tensor, index: i64, stream: u64) -> Result<()> {
    let on = device_of(OP, "grad", grad)?;
    let kind = check_float(OP, "grad", grad, on)?;
    check_contiguous(OP, "grad", grad)?;
    check_sums(sums, on)?;
    if !(0..sums.numel() as i64).contains(&index) {
        return Err(CatError::value(OP, "index", format!("in 0..{}", sums.numel()), index));
    }
    if let Device::Cuda(gpu) = on {
        let stream = Stream::new(OP, gpu, stream)?;
        return cuda::sum_of_squares(&stream, on, grad, address(OP, sums)? + 8 * index as u64);
    }
    let grad = elements(OP, grad)?;
    let sum = match kind {
        Kind::Double => cpu::sum_of_squares::<f64>(OP, threads(), grad)?,
        _ => cpu::sum_of_squares::<f32>(OP, threads(), grad)?,
    };
    write(sums, index as usize, sum)
}

/// One step in place, with norm = sqrt(sum(sums)):
///
/// g = min(1, max_grad_norm / (norm + 1e-6)) grad; p = p (1 - lr weight_decay); m = beta1 m + (1 - beta1) g;
/// v = beta2 v + (1 - beta2) g^2; p = p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps); grad = 0
///
/// Where the norm is not finite, weights, moments and step count stay as they are; the gradients become zero. On the
/// CPU the settings and the count are checked; on a GPU that would be to wait for them.
pub fn adamw(problem: AdamW) -> Result<()> {
    let on = device_of(OP, "param", problem.param)?;
    let kind = check(&problem, on)?;
    if let Device::Cuda(gpu) = on {
        let stream = Stream::new(OP, gpu, problem.stream)?;
        return cuda::adamw(&stream, on, &problem);
    }
    match kind {
        Kind::Double => run::<f64>(problem),
        _ => run::<f32>(problem),
    }
}

fn run<T: Real>(problem: AdamW) -> Result<()> {
    let settings = numbers(OP, problem.settings)?;
    let [lr, beta1, beta2, eps, weight_decay, max_grad_norm] = settings[..] else {
        return Err(CatError::shape(OP, "settings", "[6]", &problem.settings.size()));
    };
    check_settings(&settings)?;
    let count = numbers(OP, problem.step)?.iter().sum::<f64>();
    if !(count >= 0.0 && count.is_finite()) {
        return Err(CatError::value(OP, "step", "a count >= 0", count));
    }
    let norm = numbers(OP, problem.sums)?.iter().sum::<f64>().sqrt();
    if !norm.is_finite() {
        let _ = problem.grad.f_zero_().during(OP)?;
        return match problem.skipped {
            Some(skipped) => skipped.f_add_scalar_(1).during(OP).map(drop),
            None => Ok(()),
        };
    }
    let typed = |tensor| {
        let elements = elements_mut(OP, tensor)?;
        elements.typed::<T>().ok_or_else(|| CatError::torch_message(OP, "a state buffer changed its dtype"))
    };
    let buffers = Buffers {
        param: typed(problem.param)?,
        grad: elements_mut(OP, problem.grad)?,
        exp_avg: typed(problem.exp_avg)?,
        exp_avg_sq: typed(problem.exp_avg_sq)?,
        low_precision: problem.low_precision.map(|tensor| elements_mut(OP, tensor)).transpose()?,
    };
    let count = count + 1.0;
    let step = Step {
        // As clip_grad_norm_: the 1e-6 keeps a zero norm from dividing.
        grad_scale: (max_grad_norm / (norm + 1e-6)).min(1.0),
        decay: 1.0 - lr * weight_decay,
        beta1,
        beta2,
        step_size: lr / (1.0 - beta1.powf(count)),
        correction2_sqrt: (1.0 - beta2.powf(count)).sqrt(),
        eps,
    };
    cpu::adamw(OP, threads(), &buffers, step)?;
    write(problem.step, 0, count as f32)
}

/// Writes one element of a contiguous CPU tensor.
fn write<T: Real>(tensor: &mut Tensor, index: usize, value: T) -> Result<()> {
    let slots = elements_mut(OP, tensor)?.typed::<T>();
    let slots = slots.ok_or_else(|| CatError::torch_message(OP, "a count changed its dtype"))?;
    // SAFETY: the only use of the tensor's memory.
    let slot = unsafe { slots.range(index, 1) };
    slot[0] = value;
    Ok(())
}

/// Checks the buffers and the tensors of numbers; returns the dtype of the weights.
fn check(problem: &AdamW, on: Device) -> Result<Kind> {
    const REAL: [Kind; 2] = [Kind::Float, Kind::Double];
    let expected = "float32 or float64 (lower precisions are a copy)";
    let kind = check_kind("param", problem.param, on, &REAL, expected)?;
    let moments = [("exp_avg", &*problem.exp_avg), ("exp_avg_sq", &*problem.exp_avg_sq)];
    for (name, tensor) in moments {
        check_kind(name, tensor, on, &[kind], "the dtype of `param`")?;
    }
    let low_precision = problem.low_precision.as_deref().map(|tensor| ("low_precision", tensor));
    let others = [("grad", &*problem.grad)].into_iter().chain(low_precision);
    for (name, tensor) in others.clone() {
        check_float(OP, name, tensor, on)?;
    }
    let shape = problem.param.size();
    for (name, tensor) in [("param", &*problem.param)].into_iter().chain(others).chain(moments) {
        check_shape(OP, name, tensor, &shape)?;
        check_contiguous(OP, name, tensor)?;
    }
    check_kind("settings", problem.settings, on, &REAL, "float32 or float64")?;
    check_shape(OP, "settings", problem.settings, &[6])?;
    check_contiguous(OP, "settings", problem.settings)?;
    check_sums(problem.sums, on)?;
    check_kind("step", problem.step, on, &[Kind::Float], "float32")?;
    check_shape(OP, "step", problem.step, &[])?;
    if let Some(skipped) = problem.skipped.as_deref() {
        check_kind("skipped", skipped, on, &[Kind::Int64], "int64")?;
        check_shape(OP, "skipped", skipped, &[])?;
    }
    Ok(kind)
}

fn check_sums(sums: &Tensor, on: Device) -> Result<()> {
    check_kind("sums", sums, on, &[Kind::Double], "float64")?;
    if sums.dim() != 1 || sums.numel() == 0 {
        return Err(CatError::shape(OP, "sums", "[K] with K >= 1", &sums.size()));
    }
    check_contiguous(OP, "sums", sums)
}

fn check_kind(
    argument: &'static str,
    tensor: &Tensor,
    on: Device,
    kinds: &[Kind],
    expected: &'static str,
) -> Result<Kind> {
    check_dense(OP, argument, tensor, on)?;
    let kind = kind_of(OP, argument, tensor)?;
    if kinds.contains(&kind) {
        return Ok(kind);
    }
    Err(CatError::Dtype { op: OP, argument, expected, got: dtype_name(kind) })
}

/// Checks the numbers of `AdamW::settings`.
fn check_settings(settings: &[f64]) -> Result<()> {
    let (finite, unit) = ("a finite number >= 0", "in [0, 1)");
    let expected = [("lr", finite), ("beta1", unit), ("beta2", unit), ("eps", finite), ("weight_decay", finite)];
    for ((name, expected), &value) in expected.into_iter().zip(settings) {
        if !(value >= 0.0 && value < if expected == unit { 1.0 } else { f64::INFINITY }) {
            return Err(CatError::value(OP, name, expected, value));
        }
    }
    match settings.last() {
        Some(&limit) if limit.is_nan() || limit <= 0.0 => Err(CatError::value(OP, "max_grad_norm", "> 0", limit)),
        _ => Ok(()),
    }
}
