//! The linear layer with a LoRA branch, for `cat_rs.ops.lora_linear`.

use pyo3::prelude::*;

use super::convert::{argument, optional, wrap, wrap_optional, PyTensor};
use super::released;
use crate::ops::lora_linear::Layer;

/// See `cat_rs.lora_linear`. Returns (y, scaling * x A^T).
#[pyfunction]
pub fn lora_linear_forward(
    py: Python<'_>,
    x: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    lora_a: PyTensor,
    lora_b: PyTensor,
    #[pyo3(from_py_with = argument)] scaling: f64,
) -> PyResult<(PyObject, PyObject)> {
    let layer = Layer { weight: weight.0, bias: optional(bias), lora_a: lora_a.0, lora_b: lora_b.0, scaling };
    let (y, hidden) = released(py, move || layer.forward(&x))?;
    Ok((wrap(py, y)?, wrap(py, hidden)?))
}

/// The gradients of `lora_linear_forward`: (dx, dA, dB), each where wanted.
#[pyfunction]
#[allow(clippy::too_many_arguments, clippy::type_complexity)]
pub fn lora_linear_backward(
    py: Python<'_>,
    grad: PyTensor,
    x: PyTensor,
    weight: PyTensor,
    lora_a: PyTensor,
    lora_b: PyTensor,
    hidden: PyTensor,
    #[pyo3(from_py_with = argument)] scaling: f64,
    #[pyo3(from_py_with = argument)] wanted: (bool, bool, bool),
) -> PyResult<(Option<PyObject>, Option<PyObject>, Option<PyObject>)> {
    let layer = Layer { weight: weight.0, bias: None, lora_a: lora_a.0, lora_b: lora_b.0, scaling };
    let gradients = released(py, move || layer.backward(&grad, &x, &hidden, [wanted.0, wanted.1, wanted.2]))?;
    Ok((wrap_optional(py, gradients.x)?, wrap_optional(py, gradients.lora_a)?, wrap_optional(py, gradients.lora_b)?))
}
