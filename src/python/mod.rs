//! The Python module `cat_rs._core`: argument conversion, the GIL, and the one map from errors to exceptions.
//!
//! Shapes, dtypes and formulas are documented once, on the Python functions of `cat_rs` that call these.

mod adapter_file;
mod convert;

use std::panic::{catch_unwind, AssertUnwindSafe};

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3_tch::PyTensor;
use tch::Tensor;

use self::convert::{detached, optional, raise, wrap};
use crate::cpu::{matmul_beats_library, parallel_available, simd_level};
use crate::error::{CatError, Result};
use crate::ops;
use crate::ops::adamw::{AdamW, FlatBuffers};
use crate::ops::cat_loss::{CatLoss, Pair};
use crate::ops::frozen_conv2d::Convolution;
use crate::ops::frozen_linear::Linear;
use crate::ops::lora_linear::Layer;
use crate::ops::lora_up::UpProjection;
use crate::ops::noising::PredictionType;
use crate::ops::similarity::Reduce;
use crate::ops::statistics::{Bootstrap, Group, Numbers, Statistic};
use crate::step::StudentLoss;

/// Runs `work` without the GIL and raises its error; a panic, which would be a bug, becomes an error too.
fn released<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let outcome = py.allow_threads(|| catch_unwind(AssertUnwindSafe(work)));
    let panicked = |_| Err(CatError::Kernel { op: "cat_rs", message: "a bug: the kernel panicked".into() });
    outcome.unwrap_or_else(panicked).map_err(|error| raise(py, &error))
}

/// See `cat_rs.cat_loss`. Returns (total, (diffusion, cat), gradient, gradient).
#[pyfunction]
#[pyo3(signature = (
    model_pred, target, model_pred_no_trigger, base_pred, sample_weight, mask, cat_factor, mask_normalize,
    scale, wanted
))]
#[allow(clippy::too_many_arguments, clippy::type_complexity)]
fn cat_loss(
    py: Python<'_>,
    model_pred: PyTensor,
    target: PyTensor,
    model_pred_no_trigger: PyTensor,
    base_pred: PyTensor,
    sample_weight: Option<PyTensor>,
    mask: Option<PyTensor>,
    cat_factor: f64,
    mask_normalize: bool,
    scale: f64,
    wanted: (bool, bool),
) -> PyResult<(PyObject, (f64, f64), Option<PyObject>, Option<PyObject>)> {
    let tensors = [model_pred.0, target.0, model_pred_no_trigger.0, base_pred.0];
    let (sample_weight, mask) = (optional(sample_weight), optional(mask));
    let (total, values, [first, second]) = released(py, move || {
        let [model_pred, target, model_pred_no_trigger, base_pred] = &tensors;
        let loss = CatLoss {
            diffusion: Pair { pred: model_pred, target },
            preservation: Some(Pair { pred: model_pred_no_trigger, target: base_pred }),
            cat_factor,
            sample_weight: sample_weight.as_ref(),
            mask: mask.as_ref(),
            mask_normalize,
        };
        let (values, grads) = ops::cat_loss::cat_loss(&loss, scale, [wanted.0, wanted.1])?;
        Ok((values.total()?, values, grads))
    })?;
    let wrapped = |tensor: Option<Tensor>| tensor.map(|tensor| wrap(py, tensor)).transpose();
    Ok((wrap(py, total)?, (values.diffusion, values.cat), wrapped(first)?, wrapped(second)?))
}

/// The loss of a step over the doubled batch: (total, [diffusion, cat], dL/dstudent).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn student_loss(
    py: Python<'_>,
    student: PyTensor,
    target: PyTensor,
    base: Option<PyTensor>,
    sample_weight: Option<PyTensor>,
    mask: Option<PyTensor>,
    cat_factor: f64,
    scale: f64,
) -> PyResult<(PyObject, PyObject, PyObject)> {
    let loss = StudentLoss {
        student: detached(py, student)?,
        target: target.0,
        base: optional(base),
        sample_weight: optional(sample_weight),
        mask: optional(mask),
        cat_factor,
        scale,
    };
    let (total, parts, grad) = released(py, move || {
        let (values, grad) = loss.evaluate()?;
        Ok((values.total()?, values.parts()?, grad))
    })?;
    Ok((wrap(py, total)?, wrap(py, parts)?, wrap(py, grad)?))
}

/// See `cat_rs.functional.noising`.
#[pyfunction]
#[pyo3(signature = (latents, noise, signal_rate, noise_rate, prediction_type, copies, stream = 0))]
#[allow(clippy::too_many_arguments, unused_variables)]
fn noising(
    py: Python<'_>,
    latents: PyTensor,
    noise: PyTensor,
    signal_rate: PyTensor,
    noise_rate: PyTensor,
    prediction_type: &str,
    copies: usize,
    stream: usize,
) -> PyResult<(PyObject, PyObject)> {
    let prediction_type = PredictionType::parse(prediction_type).map_err(|error| raise(py, &error))?;
    let (noisy, target) = released(py, move || {
        ops::noising::noising(&latents, &noise, &signal_rate, &noise_rate, prediction_type, copies)
    })?;
    Ok((wrap(py, noisy)?, wrap(py, target)?))
}

/// See `cat_rs.lora_linear`. Returns (y, scaling * x A^T).
#[pyfunction]
fn lora_linear_forward(
    py: Python<'_>,
    x: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    lora_a: PyTensor,
    lora_b: PyTensor,
    scaling: f64,
) -> PyResult<(PyObject, PyObject)> {
    let layer = Layer { weight: weight.0, bias: optional(bias), lora_a: lora_a.0, lora_b: lora_b.0, scaling };
    let (y, hidden) = released(py, move || layer.forward(&x))?;
    Ok((wrap(py, y)?, wrap(py, hidden)?))
}

/// The gradients of `lora_linear_forward`: (dx, dA, dB), each where wanted.
#[pyfunction]
#[allow(clippy::too_many_arguments, clippy::type_complexity)]
fn lora_linear_backward(
    py: Python<'_>,
    grad: PyTensor,
    x: PyTensor,
    weight: PyTensor,
    lora_a: PyTensor,
    lora_b: PyTensor,
    hidden: PyTensor,
    scaling: f64,
    wanted: (bool, bool, bool),
) -> PyResult<(Option<PyObject>, Option<PyObject>, Option<PyObject>)> {
    let layer = Layer { weight: weight.0, bias: None, lora_a: lora_a.0, lora_b: lora_b.0, scaling };
    let gradients = released(py, move || layer.backward(&grad, &x, &hidden, [wanted.0, wanted.1, wanted.2]))?;
    let wrapped = |tensor: Option<Tensor>| tensor.map(|tensor| wrap(py, tensor)).transpose();
    Ok((wrapped(gradients.x)?, wrapped(gradients.lora_a)?, wrapped(gradients.lora_b)?))
}

/// Adds scaling * B h onto y in place. See `cat_rs.functional.lora_up_`.
#[pyfunction]
fn lora_up_forward(
    py: Python<'_>,
    y: PyTensor,
    hidden: PyTensor,
    lora_b: PyTensor,
    scaling: f64,
    channels_second: bool,
) -> PyResult<()> {
    let projection = UpProjection { lora_b: lora_b.0, scaling, channels_second };
    let mut y = y.0;
    released(py, move || projection.add_to(&mut y, &hidden))
}

/// The gradients of `lora_up_forward`: (dh, dB), each where wanted.
#[pyfunction]
fn lora_up_backward(
    py: Python<'_>,
    grad: PyTensor,
    hidden: PyTensor,
    lora_b: PyTensor,
    scaling: f64,
    channels_second: bool,
    wanted: (bool, bool),
) -> PyResult<(Option<PyObject>, Option<PyObject>)> {
    let projection = UpProjection { lora_b: lora_b.0, scaling, channels_second };
    let [dh, db] = released(py, move || projection.backward(&grad, &hidden, [wanted.0, wanted.1]))?;
    let wrapped = |tensor: Option<Tensor>| tensor.map(|tensor| wrap(py, tensor)).transpose();
    Ok((wrapped(dh)?, wrapped(db)?))
}

/// y = x W^T + b.
#[pyfunction]
fn frozen_linear_forward(py: Python<'_>, x: PyTensor, weight: PyTensor, bias: Option<PyTensor>) -> PyResult<PyObject> {
    let layer = Linear { weight: weight.0, bias: optional(bias) };
    let y = released(py, move || layer.forward(&x))?;
    wrap(py, y)
}

/// dL/dx of `frozen_linear_forward`.
#[pyfunction]
fn frozen_linear_backward(py: Python<'_>, grad: PyTensor, weight: PyTensor) -> PyResult<PyObject> {
    let layer = Linear { weight: weight.0, bias: None };
    let dx = released(py, move || layer.backward(&grad))?;
    wrap(py, dx)
}

/// See `cat_rs.convolution`. Strides, paddings and dilations are (height, width).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn frozen_conv2d_forward(
    py: Python<'_>,
    x: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    stride: [i64; 2],
    padding: [i64; 2],
    dilation: [i64; 2],
) -> PyResult<PyObject> {
    let layer = Convolution { weight: weight.0, bias: optional(bias), stride, padding, dilation };
    let y = released(py, move || layer.forward(&x))?;
    wrap(py, y)
}

/// dL/dx of `frozen_conv2d_forward` for an input of `size` (height, width).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn frozen_conv2d_backward(
    py: Python<'_>,
    grad: PyTensor,
    weight: PyTensor,
    size: [i64; 2],
    stride: [i64; 2],
    padding: [i64; 2],
    dilation: [i64; 2],
) -> PyResult<PyObject> {
    let layer = Convolution { weight: weight.0, bias: None, stride, padding, dilation };
    let dx = released(py, move || layer.backward(&grad, size))?;
    wrap(py, dx)
}

/// The L2 norm of a flat gradient buffer.
#[pyfunction]
fn grad_norm(py: Python<'_>, grad: PyTensor) -> PyResult<f64> {
    released(py, move || ops::adamw::grad_norm(&grad))
}

/// One AdamW step over flat buffers, in place; see `cat_rs.FlatAdamW`.
#[pyfunction]
#[pyo3(signature = (
    param, grad, exp_avg, exp_avg_sq, low_precision, *, lr, beta1, beta2, eps, weight_decay, grad_scale, step
))]
#[allow(clippy::too_many_arguments)]
fn adamw_step(
    py: Python<'_>,
    mut param: PyTensor,
    mut grad: PyTensor,
    mut exp_avg: PyTensor,
    mut exp_avg_sq: PyTensor,
    low_precision: Option<PyTensor>,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    grad_scale: f64,
    mut step: PyTensor,
) -> PyResult<()> {
    let settings = AdamW { lr, beta1, beta2, eps, weight_decay, grad_scale };
    let mut low_precision = optional(low_precision);
    released(py, move || {
        let buffers = FlatBuffers {
            param: &mut param.0,
            grad: &mut grad.0,
            exp_avg: &mut exp_avg.0,
            exp_avg_sq: &mut exp_avg_sq.0,
            low_precision: low_precision.as_mut(),
            step: &mut step.0,
        };
        ops::adamw::adamw(buffers, settings)
    })
}

/// See `cat_rs.similarity`.
#[pyfunction]
fn paired_similarity(py: Python<'_>, a: PyTensor, b: PyTensor) -> PyResult<PyObject> {
    let values = released(py, move || ops::similarity::similarity(&a, &b))?;
    wrap(py, values)
}

/// See `cat_rs.cross_similarity`.
#[pyfunction]
fn cross_similarity(py: Python<'_>, a: PyTensor, b: PyTensor, reduce: &str) -> PyResult<PyObject> {
    let reduce = Reduce::parse(reduce).map_err(|error| raise(py, &error))?;
    let values = released(py, move || ops::similarity::cross_similarity(&a, &b, reduce))?;
    wrap(py, values)
}

/// See `cat_rs.harmonic_mean`.
#[pyfunction]
fn harmonic_mean(py: Python<'_>, values: PyReadonlyArray1<'_, f64>) -> PyResult<f64> {
    let values = values.as_slice()?;
    released(py, || ops::statistics::harmonic_mean(values))
}

type Values<'py> = PyReadonlyArray1<'py, f64>;
type Clusters<'py> = Option<PyReadonlyArray1<'py, i64>>;

fn numbers<'a>(argument: &'static str, values: &'a Values<'_>) -> PyResult<Numbers<'a, f64>> {
    Ok(Numbers { argument, values: values.as_slice()? })
}

fn cluster_numbers<'a>(argument: &'static str, clusters: &'a Clusters<'_>) -> PyResult<Option<Numbers<'a, i64>>> {
    clusters.as_ref().map(|clusters| Ok(Numbers { argument, values: clusters.as_slice()? })).transpose()
}

fn statistic(harmonic: bool) -> Statistic {
    if harmonic {
        Statistic::HarmonicMean
    } else {
        Statistic::Mean
    }
}

/// See `cat_rs.bootstrap_interval`; several groups are resampled apart and joined by their harmonic mean.
#[pyfunction]
#[pyo3(signature = (groups, *, harmonic, confidence, resamples, seed))]
fn bootstrap_interval(
    py: Python<'_>,
    groups: Vec<(Values<'_>, Clusters<'_>)>,
    harmonic: bool,
    confidence: f64,
    resamples: i64,
    seed: u64,
) -> PyResult<(f64, f64)> {
    let groups = groups
        .iter()
        .map(|(values, clusters)| {
            let samples = [numbers("values", values)?];
            Ok(Group { samples, clusters: cluster_numbers("clusters", clusters)? })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let settings = Bootstrap { statistic: statistic(harmonic), confidence, resamples, seed };
    released(py, || ops::statistics::bootstrap_interval(&groups, settings))
}

/// See `cat_rs.bootstrap_difference`.
#[pyfunction]
#[pyo3(signature = (a, b, clusters, *, harmonic, confidence, resamples, seed))]
#[allow(clippy::too_many_arguments)]
fn bootstrap_difference(
    py: Python<'_>,
    a: Values<'_>,
    b: Values<'_>,
    clusters: Clusters<'_>,
    harmonic: bool,
    confidence: f64,
    resamples: i64,
    seed: u64,
) -> PyResult<(f64, f64)> {
    let samples = [numbers("a", &a)?, numbers("b", &b)?];
    let group = Group { samples, clusters: cluster_numbers("clusters", &clusters)? };
    let settings = Bootstrap { statistic: statistic(harmonic), confidence, resamples, seed };
    released(py, || ops::statistics::bootstrap_difference("bootstrap_difference", &[group], settings))
}

/// See `cat_rs.kps_difference`.
#[pyfunction]
#[pyo3(signature = (a, b, clusters, *, confidence, resamples, seed))]
fn kps_difference(
    py: Python<'_>,
    a: [Values<'_>; 2],
    b: [Values<'_>; 2],
    clusters: [Clusters<'_>; 2],
    confidence: f64,
    resamples: i64,
    seed: u64,
) -> PyResult<(f64, f64)> {
    let groups = [
        Group {
            samples: [numbers("a[0]", &a[0])?, numbers("b[0]", &b[0])?],
            clusters: cluster_numbers("clusters[0]", &clusters[0])?,
        },
        Group {
            samples: [numbers("a[1]", &a[1])?, numbers("b[1]", &b[1])?],
            clusters: cluster_numbers("clusters[1]", &clusters[1])?,
        },
    ];
    let settings = Bootstrap { statistic: Statistic::HarmonicMean, confidence, resamples, seed };
    released(py, || ops::statistics::bootstrap_difference("kps_difference", &groups, settings))
}

/// What this module was built with and runs on.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("torch", env!("CAT_RS_TORCH"))?;
    info.set_item("simd", simd_level())?;
    info.set_item("matmul", if matmul_beats_library() { "cat-rs" } else { "PyTorch's library" })?;
    info.set_item("threads", if parallel_available() { "PyTorch's OpenMP" } else { "single" })?;
    Ok(info)
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cat_loss, module)?)?;
    module.add_function(wrap_pyfunction!(student_loss, module)?)?;
    module.add_function(wrap_pyfunction!(noising, module)?)?;
    module.add_function(wrap_pyfunction!(lora_linear_forward, module)?)?;
    module.add_function(wrap_pyfunction!(lora_linear_backward, module)?)?;
    module.add_function(wrap_pyfunction!(lora_up_forward, module)?)?;
    module.add_function(wrap_pyfunction!(lora_up_backward, module)?)?;
    module.add_function(wrap_pyfunction!(frozen_linear_forward, module)?)?;
    module.add_function(wrap_pyfunction!(frozen_linear_backward, module)?)?;
    module.add_function(wrap_pyfunction!(frozen_conv2d_forward, module)?)?;
    module.add_function(wrap_pyfunction!(frozen_conv2d_backward, module)?)?;
    module.add_function(wrap_pyfunction!(grad_norm, module)?)?;
    module.add_function(wrap_pyfunction!(adamw_step, module)?)?;
    module.add_function(wrap_pyfunction!(paired_similarity, module)?)?;
    module.add_function(wrap_pyfunction!(cross_similarity, module)?)?;
    module.add_function(wrap_pyfunction!(harmonic_mean, module)?)?;
    module.add_function(wrap_pyfunction!(bootstrap_interval, module)?)?;
    module.add_function(wrap_pyfunction!(bootstrap_difference, module)?)?;
    module.add_function(wrap_pyfunction!(kps_difference, module)?)?;
    module.add_function(wrap_pyfunction!(adapter_file::read_safetensors, module)?)?;
    module.add_function(wrap_pyfunction!(adapter_file::write_safetensors, module)?)?;
    module.add_function(wrap_pyfunction!(adapter_file::adapter_layers, module)?)?;
    module.add_function(wrap_pyfunction!(adapter_file::adapter_tensors, module)?)?;
    module.add_function(wrap_pyfunction!(build_info, module)?)?;
    Ok(())
}
