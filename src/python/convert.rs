//! Tensors to and from Python, and errors to exceptions.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

use crate::error::{CatError, TorchContext};

/// The tensor of an optional argument.
pub fn optional(tensor: Option<PyTensor>) -> Option<Tensor> {
    tensor.map(|tensor| tensor.0)
}

/// The same memory outside the autograd graph.
pub fn detached(py: Python<'_>, tensor: PyTensor) -> PyResult<Tensor> {
    tensor.0.f_detach().during("detach").map_err(|error| raise(py, &error))
}

/// A tensor as a Python object; unlike pyo3-tch's conversion, a failure raises.
pub fn wrap(py: Python<'_>, tensor: Tensor) -> PyResult<PyObject> {
    let pointer = tensor.pyobject_wrap().during("wrap").map_err(|error| raise(py, &error))?;
    // SAFETY: libtorch's shim returns a new reference, or null with a Python error set.
    unsafe { PyObject::from_owned_ptr_or_err(py, pointer.cast()) }
}

/// The exception of `cat_rs.errors` that belongs to a failure.
pub fn raise(py: Python<'_>, error: &CatError) -> PyErr {
    let class = match error {
        CatError::Shape { .. } => "ShapeError",
        CatError::Dtype { .. } => "DtypeError",
        CatError::Device { .. } => "DeviceError",
        CatError::Layout { .. } => "LayoutError",
        CatError::Value { .. } => "InvalidValueError",
        CatError::Torch { .. } | CatError::Kernel { .. } => "KernelError",
    };
    let instance = py
        .import("cat_rs.errors")
        .and_then(|errors| errors.getattr(class))
        .and_then(|class| class.call1((error.to_string(),)));
    match instance {
        Ok(instance) => PyErr::from_value(instance),
        Err(_) => PyRuntimeError::new_err(error.to_string()),
    }
}
