//! The frozen linear layer, for `cat_rs.ops.frozen_linear`.

use pyo3::prelude::*;

use super::convert::{optional, wrap, PyTensor};
use super::released;
use crate::ops::frozen_linear::Linear;

/// y = x W^T + b.
#[pyfunction]
pub fn frozen_linear_forward(
    py: Python<'_>,
    x: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
) -> PyResult<PyObject> {
    let layer = Linear { weight: weight.0, bias: optional(bias) };
    let y = released(py, move || layer.forward(&x))?;
    wrap(py, y)
}

/// dL/dx of `frozen_linear_forward`.
#[pyfunction]
pub fn frozen_linear_backward(py: Python<'_>, grad: PyTensor, weight: PyTensor) -> PyResult<PyObject> {
    let layer = Linear { weight: weight.0, bias: None };
    let dx = released(py, move || layer.backward(&grad))?;
    wrap(py, dx)
}
