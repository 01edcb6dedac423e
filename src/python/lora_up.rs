//! The up projection of a LoRA branch, for `cat_rs.ops.lora_up`.

use pyo3::prelude::*;

use super::convert::{argument, wrap_optional, PyTensor};
use super::released;
use crate::ops::lora_up::UpProjection;

/// Adds scaling * B h onto y in place. See `cat_rs.ops.lora_up.lora_up_`.
#[pyfunction]
pub fn lora_up_forward(
    py: Python<'_>,
    y: PyTensor,
    hidden: PyTensor,
    lora_b: PyTensor,
    #[pyo3(from_py_with = argument)] scaling: f64,
    channels_second: bool,
) -> PyResult<()> {
    let projection = UpProjection { lora_b: lora_b.0, scaling, channels_second };
    let mut y = y.0;
    released(py, move || projection.add_to(&mut y, &hidden))
}

/// The gradients of `lora_up_forward`: (dh, dB), each where wanted.
#[pyfunction]
pub fn lora_up_backward(
    py: Python<'_>,
    grad: PyTensor,
    hidden: PyTensor,
    lora_b: PyTensor,
    #[pyo3(from_py_with = argument)] scaling: f64,
    channels_second: bool,
    #[pyo3(from_py_with = argument)] wanted: (bool, bool),
) -> PyResult<(Option<PyObject>, Option<PyObject>)> {
    let projection = UpProjection { lora_b: lora_b.0, scaling, channels_second };
    let [dh, db] = released(py, move || projection.backward(&grad, &hidden, [wanted.0, wanted.1]))?;
    Ok((wrap_optional(py, dh)?, wrap_optional(py, db)?))
}
