//! Similarities of embeddings, for `cat_rs.ops.similarity`.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use super::convert::{argument, raise, wrap, PyTensor};
use super::interruptible;
use crate::ops;
use crate::ops::similarity::Reduce;

/// See `cat_rs.similarity`.
#[pyfunction]
#[pyo3(signature = (a, b, stream = 0))]
pub fn paired_similarity(
    py: Python<'_>,
    a: PyTensor,
    b: PyTensor,
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<PyObject> {
    let values = interruptible(py, move || ops::similarity::similarity(&a, &b, stream))?;
    wrap(py, values)
}

/// See `cat_rs.cross_similarity`.
#[pyfunction]
#[pyo3(signature = (a, b, reduce, stream = 0))]
pub fn cross_similarity(
    py: Python<'_>,
    a: PyTensor,
    b: PyTensor,
    #[pyo3(from_py_with = argument)] reduce: PyBackedStr,
    #[pyo3(from_py_with = argument)] stream: u64,
) -> PyResult<PyObject> {
    let reduce = Reduce::parse(&reduce).map_err(|error| raise(py, &error))?;
    let values = interruptible(py, move || ops::similarity::cross_similarity(&a, &b, reduce, stream))?;
    wrap(py, values)
}
