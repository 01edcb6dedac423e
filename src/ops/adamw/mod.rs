//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) with gradient-norm clipping over flat buffers.

mod cpu;

use tch::{Kind, Tensor};

use self::cpu::{Buffers, Step};
use super::threads;
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{check_float, check_shape, dtype_name, elements, elements_mut};

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
    let kind = check_float(OP, "grad", grad)?;
    check_contiguous("grad", grad)?;
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
    let kind = check_float(OP, "param", buffers.param)?;
    if !matches!(kind, Kind::Float | Kind::Double) {
        let expected = "float32 or float64 (lower precisions are a copy)";
        return Err(CatError::Dtype { op: OP, argument: "param", expected, got: dtype_name(kind) });
    }
    let shape = buffers.param.size();
    let state = [("exp_avg", &*buffers.exp_avg), ("exp_avg_sq", &*buffers.exp_avg_sq)];
    for (name, tensor) in state {
        let got = check_float(OP, name, tensor)?;
        if got != kind {
            let expected = "the dtype of `param`";
            return Err(CatError::Dtype { op: OP, argument: name, expected, got: dtype_name(got) });
        }
    }
    check_float(OP, "grad", buffers.grad)?;
    let low_precision = buffers.low_precision.as_deref().map(|tensor| ("low_precision", tensor));
    if let Some((name, tensor)) = low_precision {
        check_float(OP, name, tensor)?;
    }
    let all = [("param", &*buffers.param), ("grad", &*buffers.grad)].into_iter().chain(state).chain(low_precision);
    for (name, tensor) in all {
        check_shape(OP, name, tensor, &shape)?;
        check_contiguous(name, tensor)?;
    }
    check_settings(&settings)?;
    check_step(buffers.step)?;
    match kind {
        Kind::Double => run::<f64>(buffers, settings),
        _ => run::<f32>(buffers, settings),
    }
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

fn check_step(step: &Tensor) -> Result<()> {
    const NAME: &str = "step";
    let kind = check_float(OP, NAME, step)?;
    if kind != Kind::Float {
        return Err(CatError::Dtype { op: OP, argument: NAME, expected: "float32", got: dtype_name(kind) });
    }
    check_shape(OP, NAME, step, &[])?;
    let count = step.f_double_value(&[]).during(OP)?;
    if count >= 0.0 && count.is_finite() {
        Ok(())
    } else {
        Err(CatError::value(OP, NAME, "a count >= 0", count))
    }
}

fn check_contiguous(argument: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.is_contiguous() {
        return Ok(());
    }
    let got = format!("strides {:?}", tensor.stride());
    Err(CatError::Layout { op: OP, argument, expected: "contiguous", got })
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
