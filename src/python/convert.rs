//! Tensors to and from Python, and errors to exceptions.

use std::io;
use std::path::Path;

use pyo3::exceptions::{PyOSError, PyRuntimeError};
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

/// As [`wrap`]; None where there is no tensor.
pub fn wrap_optional(py: Python<'_>, tensor: Option<Tensor>) -> PyResult<Option<PyObject>> {
    tensor.map(|tensor| wrap(py, tensor)).transpose()
}

/// The exception of `cat_rs.errors` that belongs to a failure.
pub fn raise(py: Python<'_>, error: &CatError) -> PyErr {
    let class = match error {
        CatError::Shape { .. } => "ShapeError",
        CatError::Dtype { .. } => "DtypeError",
        CatError::Device { .. } => "DeviceError",
        CatError::Layout { .. } => "LayoutError",
        CatError::Value { .. } => "InvalidValueError",
        CatError::Torch { .. } | CatError::Kernel { .. } | CatError::Cuda { .. } => "KernelError",
        CatError::Adapter { .. } => "AdapterError",
        CatError::Io { path, source, .. } => return raise_io(py, path, source),
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

/// OSError with number and file name, of which Python makes FileNotFoundError and the like.
fn raise_io(py: Python<'_>, path: &Path, source: &io::Error) -> PyErr {
    let Some(number) = source.raw_os_error() else {
        return PyOSError::new_err(format!("{}: {source}", path.display()));
    };
    let described = py.import("os").and_then(|os| os.call_method1("strerror", (number,)));
    let instance = described.and_then(|text| py.get_type::<PyOSError>().call1((number, text, path.as_os_str())));
    instance.map_or_else(|error| error, PyErr::from_value)
}
