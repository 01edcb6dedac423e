//! AdamW over flat buffers, for `cat_rs.ops.adamw`.

use pyo3::prelude::*;

use super::convert::{argument, optional, PyTensor};
use super::released;
use crate::ops;
use crate::ops::adamw::AdamW;

/// See `cat_rs.ops.adamw.sum_of_squares`.
#[pyfunction]
#[pyo3(signature = (grad, sums, index, stream = 0))]
pub fn sum_of_squares(
    py: Python<'_>,
    grad: PyTensor,
    mut sums: PyTensor,
    #[pyo3(from_py_with = argument)] index: i64,
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<()> {
    released(py, move || ops::adamw::sum_of_squares(&grad, &mut sums.0, index, stream))
}

/// See `cat_rs.ops.adamw.adamw_step`.
#[pyfunction]
#[pyo3(signature = (
    param, grad, exp_avg, exp_avg_sq, low_precision, *, settings, sums, step, skipped, stream = 0
))]
#[allow(clippy::too_many_arguments)]
pub fn adamw_step(
    py: Python<'_>,
    mut param: PyTensor,
    mut grad: PyTensor,
    mut exp_avg: PyTensor,
    mut exp_avg_sq: PyTensor,
    low_precision: Option<PyTensor>,
    settings: PyTensor,
    sums: PyTensor,
    mut step: PyTensor,
    skipped: Option<PyTensor>,
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<()> {
    let (mut low_precision, mut skipped) = (optional(low_precision), optional(skipped));
    released(py, move || {
        ops::adamw::adamw(AdamW {
            param: &mut param.0,
            grad: &mut grad.0,
            exp_avg: &mut exp_avg.0,
            exp_avg_sq: &mut exp_avg_sq.0,
            low_precision: low_precision.as_mut(),
            settings: &settings,
            sums: &sums,
            step: &mut step.0,
            skipped: skipped.as_mut(),
            stream,
        })
    })
}
