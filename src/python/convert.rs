//! Tensors to and from Python, and errors to exceptions.

use std::io;
use std::ops::Deref;
use std::path::Path;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::GILOnceCell;
use pyo3::types::PyType;
use tch::Tensor;

use crate::error::{CatError, TorchContext};

/// A tensor whose memory is its own: no DTensor, FakeTensor or other subclass that computes in its own way.
pub struct PyTensor(pub Tensor);

impl Deref for PyTensor {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.0
    }
}

impl FromPyObject<'_> for PyTensor {
    fn extract_bound(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let tensor = pyo3_tch::PyTensor::extract_bound(object)?;
        // A TypeError, because pyo3 adds the argument's name to no other.
        let refused = |name| PyTypeError::new_err(format!("expected a plain torch.Tensor, got {name}"));
        if !is_plain(object)? {
            return Err(refused(object.get_type().fully_qualified_name()?));
        }
        Ok(Self(tensor.0))
    }
}

/// Whether Python has a tensor there, plain or not.
pub fn is_tensor(object: &Bound<'_, PyAny>) -> bool {
    object.extract::<pyo3_tch::PyTensor>().is_ok()
}

/// As PyTorch tells: subclasses that compute in their own way override `__torch_dispatch__`.
fn is_plain(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    static TENSOR: GILOnceCell<Py<PyType>> = GILOnceCell::new();
    static PARAMETER: GILOnceCell<Py<PyType>> = GILOnceCell::new();
    let py = tensor.py();
    let class = tensor.get_type();
    let plain = TENSOR.import(py, "torch", "Tensor")?;
    if class.is(plain) || class.is(PARAMETER.import(py, "torch.nn", "Parameter")?) {
        return Ok(true);
    }
    Ok(class.getattr("__torch_dispatch__")?.is(&plain.getattr("__torch_dispatch__")?))
}

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
