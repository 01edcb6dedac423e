//! Noising, for `cat_rs.ops.noising`.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use super::convert::{argument, raise, wrap, PyTensor};
use super::released;
use crate::ops;
use crate::ops::noising::PredictionType;

/// See `cat_rs.ops.noising.noising`.
#[pyfunction]
#[pyo3(signature = (latents, noise, signal_rate, noise_rate, prediction_type, copies, stream = 0))]
#[allow(clippy::too_many_arguments)]
pub fn noising(
    py: Python<'_>,
    latents: PyTensor,
    noise: PyTensor,
    signal_rate: PyTensor,
    noise_rate: PyTensor,
    #[pyo3(from_py_with = argument)] prediction_type: PyBackedStr,
    #[pyo3(from_py_with = argument)] copies: usize,
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<(PyObject, PyObject)> {
    let prediction_type = PredictionType::parse(&prediction_type).map_err(|error| raise(py, &error))?;
    let (noisy, target) = released(py, move || {
        ops::noising::noising(&latents, &noise, &signal_rate, &noise_rate, prediction_type, copies, stream)
    })?;
    Ok((wrap(py, noisy)?, wrap(py, target)?))
}
