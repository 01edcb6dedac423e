//! The frozen convolution as a matrix product, for `cat_rs.ops.frozen_conv2d`.

use pyo3::prelude::*;

use super::convert::{argument, optional, wrap, PyTensor};
use super::released;
use crate::ops::frozen_conv2d::Convolution;

/// See `cat_rs.ops.frozen_conv2d`. Strides, paddings and dilations are (height, width).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn frozen_conv2d_forward(
    py: Python<'_>,
    x: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    #[pyo3(from_py_with = argument)] stride: [i64; 2],
    #[pyo3(from_py_with = argument)] padding: [i64; 2],
    #[pyo3(from_py_with = argument)] dilation: [i64; 2],
) -> PyResult<PyObject> {
    let layer = Convolution { weight: weight.0, bias: optional(bias), stride, padding, dilation };
    let y = released(py, move || layer.forward(&x))?;
    wrap(py, y)
}

/// dL/dx of `frozen_conv2d_forward` for an input of `size` (height, width).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn frozen_conv2d_backward(
    py: Python<'_>,
    grad: PyTensor,
    weight: PyTensor,
    #[pyo3(from_py_with = argument)] size: [i64; 2],
    #[pyo3(from_py_with = argument)] stride: [i64; 2],
    #[pyo3(from_py_with = argument)] padding: [i64; 2],
    #[pyo3(from_py_with = argument)] dilation: [i64; 2],
) -> PyResult<PyObject> {
    let layer = Convolution { weight: weight.0, bias: None, stride, padding, dilation };
    let dx = released(py, move || layer.backward(&grad, size))?;
    wrap(py, dx)
}
