//! The CAT loss, for `cat_rs.ops.cat_loss`.

use pyo3::prelude::*;
use pyo3::types::PyFloat;

use super::convert::{argument, detached, is_tensor, optional, wrap, wrap_optional, PyTensor};
use super::released;
use crate::ops;
use crate::ops::cat_loss::{CatLoss, Factor, LossValues, Pair, StudentLoss};

/// A number of the host, or one in a tensor.
pub enum PyFactor {
    Tensor(PyTensor),
    Number(f64),
}

impl FromPyObject<'_> for PyFactor {
    fn extract_bound(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(number) = object.downcast::<PyFloat>() {
            return Ok(Self::Number(number.value()));
        }
        // A tensor could be made a number too, but the host would wait for that of a GPU.
        if is_tensor(object) {
            return object.extract().map(Self::Tensor);
        }
        argument(object).map(Self::Number)
    }
}

impl PyFactor {
    fn as_factor(&self) -> Factor<'_> {
        match self {
            Self::Tensor(tensor) => Factor::Tensor(&tensor.0),
            Self::Number(number) => Factor::Number(*number),
        }
    }
}

/// See `cat_rs.cat_loss`. Returns (total, (diffusion, cat), gradient, gradient); on CUDA, the terms as a tensor.
#[pyfunction]
#[pyo3(signature = (
    model_pred, target, model_pred_no_trigger, base_pred, sample_weight, mask, preserve_weight, preserve_mask,
    cat_factor, mask_normalize, scale, wanted, stream = 0
))]
#[allow(clippy::too_many_arguments, clippy::type_complexity)]
pub fn cat_loss(
    py: Python<'_>,
    model_pred: PyTensor,
    target: PyTensor,
    model_pred_no_trigger: PyTensor,
    base_pred: PyTensor,
    sample_weight: Option<PyTensor>,
    mask: Option<PyTensor>,
    preserve_weight: Option<PyTensor>,
    preserve_mask: Option<PyTensor>,
    #[pyo3(from_py_with = argument)] cat_factor: f64,
    mask_normalize: bool,
    scale: PyFactor,
    #[pyo3(from_py_with = argument)] wanted: (bool, bool),
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<(PyObject, PyObject, Option<PyObject>, Option<PyObject>)> {
    let tensors = [model_pred.0, target.0, model_pred_no_trigger.0, base_pred.0];
    let weights = [optional(sample_weight), optional(preserve_weight)];
    let masks = [optional(mask), optional(preserve_mask)];
    let (total, values, [first, second]) = released(py, move || {
        let [model_pred, target, model_pred_no_trigger, base_pred] = &tensors;
        let [sample_weight, preserve_weight] = weights.each_ref().map(Option::as_ref);
        let [mask, preserve_mask] = masks.each_ref().map(Option::as_ref);
        let loss = CatLoss {
            diffusion: Pair { pred: model_pred, target, sample_weight, mask },
            preservation: Some(Pair {
                pred: model_pred_no_trigger,
                target: base_pred,
                sample_weight: preserve_weight,
                mask: preserve_mask,
            }),
            cat_factor: Factor::Number(cat_factor),
            scale: scale.as_factor(),
            mask_normalize,
            stream,
        };
        let (values, grads) = ops::cat_loss::cat_loss(&loss, [wanted.0, wanted.1])?;
        Ok((values.total()?, values, grads))
    })?;
    let parts = match values {
        LossValues::Cpu(values) => (values.diffusion, values.cat).into_pyobject(py)?.into_any().unbind(),
        LossValues::Gpu(values) => wrap(py, values.parts)?,
    };
    Ok((wrap(py, total)?, parts, wrap_optional(py, first)?, wrap_optional(py, second)?))
}

/// Multiplies gradients by a factor on their device, in place.
#[pyfunction]
#[pyo3(signature = (first, second, factor, stream = 0))]
pub fn scale_gradients(
    py: Python<'_>,
    first: Option<PyTensor>,
    second: Option<PyTensor>,
    factor: PyTensor,
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<()> {
    let grads = [optional(first), optional(second)];
    released(py, move || ops::cat_loss::scale_gradients(grads, &factor, stream))
}

/// See `cat_rs.ops.cat_loss.student_loss`. Returns (total, [diffusion, cat], gradient).
#[pyfunction]
#[pyo3(signature = (
    student, target, base_pred, sample_weight, mask, preserve_weight, preserve_mask, cat_factor, scale, stream = 0
))]
#[allow(clippy::too_many_arguments)]
pub fn student_loss(
    py: Python<'_>,
    student: PyTensor,
    target: PyTensor,
    base_pred: Option<PyTensor>,
    sample_weight: Option<PyTensor>,
    mask: Option<PyTensor>,
    preserve_weight: Option<PyTensor>,
    preserve_mask: Option<PyTensor>,
    cat_factor: PyFactor,
    scale: PyFactor,
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<(PyObject, PyObject, PyObject)> {
    let loss = StudentLoss {
        student: detached(py, student)?,
        target: target.0,
        base: optional(base_pred),
        weights: [optional(sample_weight), optional(preserve_weight)],
        masks: [optional(mask), optional(preserve_mask)],
        stream,
    };
    let (total, parts, grad) = released(py, move || {
        let (values, grad) = loss.evaluate(cat_factor.as_factor(), scale.as_factor())?;
        Ok((values.total()?, values.parts()?, grad))
    })?;
    Ok((wrap(py, total)?, wrap(py, parts)?, wrap(py, grad)?))
}
