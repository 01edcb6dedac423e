//! Tensors to and from Python, and errors to exceptions.

use std::ffi::OsString;
use std::io;
use std::ops::Deref;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use pyo3::exceptions::{PyOSError, PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::GILOnceCell;
use pyo3::types::{PyBool, PyFloat, PyInt, PyString, PyType};
use tch::Tensor;

use crate::adapter_file::{KnownModules, Metadata};
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
        if !is_plain(object)? {
            let name = object.get_type().fully_qualified_name()?;
            // A TypeError, because PyO3 adds the argument's name to no other.
            return Err(PyTypeError::new_err(format!("must be a plain torch.Tensor, got a {name}")));
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

/// What a type is called in a refusal.
pub trait Expected {
    /// After "must be".
    const EXPECTED: &'static str;
}

macro_rules! expected {
    ($($type:ty: $text:literal,)*) => {
        $(impl Expected for $type {
            const EXPECTED: &'static str = $text;
        })*
    };
}

expected! {
    f64: "a number",
    i64: "an integer in -2**63..2**63 - 1",
    u64: "an integer in 0..2**64 - 1",
    usize: "an integer in 0..2**64 - 1",
    u32: "an integer in 0..2**32 - 1",
    i32: "an integer in -2**31..2**31 - 1",
    [i64; 2]: "two integers in -2**63..2**63 - 1",
    (bool, bool): "a tuple of two bools",
    (bool, bool, bool): "a tuple of three bools",
    PyBackedStr: "a text without surrogates",
    Option<PyBackedStr>: "a text without surrogates, or None",
    Metadata: "a mapping of texts to texts",
    KnownModules: "a mapping of texts to sequences of texts",
}

/// Converts an argument, and refuses it with what was expected and what came.
///
/// PyO3's own refusals speak of Rust's types, and name the argument only where the type is at fault: not where a number
/// is out of range, a sequence has another length or a text is no Unicode.
pub fn argument<'py, T: FromPyObject<'py> + Expected>(object: &Bound<'py, PyAny>) -> PyResult<T> {
    object.extract().map_err(|error| refused(object, T::EXPECTED, error))
}

/// A path: PyO3's own conversion panics where the system's encoding has no bytes for a text.
pub fn path(object: &Bound<'_, PyAny>) -> PyResult<PathBuf> {
    let encoded = object.py().import("os")?.call_method1("fsencode", (object,));
    let encoded = encoded.map_err(|error| refused(object, "a path that the file system can encode", error))?;
    Ok(PathBuf::from(OsString::from_vec(encoded.extract()?)))
}

/// A TypeError, before which PyO3 puts the argument's name; other errors are those of the object's own methods.
fn refused(object: &Bound<'_, PyAny>, expected: &str, error: PyErr) -> PyErr {
    let py = object.py();
    let about_the_value = error.is_instance_of::<PyTypeError>(py)
        || error.is_instance_of::<PyValueError>(py)
        || error.is_instance_of::<PyOverflowError>(py);
    if !about_the_value {
        return error;
    }
    PyTypeError::new_err(format!("must be {expected}, got {}", shown(object)))
}

/// A short text for a value: of an object that may be of any size, and whose own text may fail, only its type.
fn shown(object: &Bound<'_, PyAny>) -> String {
    const LONGEST: usize = 60;
    let plain = object.is_none()
        || object.is_exact_instance_of::<PyBool>()
        || object.is_exact_instance_of::<PyInt>()
        || object.is_exact_instance_of::<PyFloat>()
        || object.is_exact_instance_of::<PyString>();
    let text = plain.then(|| object.repr().ok()).flatten().map(|text| text.to_string_lossy().into_owned());
    let length = || object.len().map_or(String::new(), |length| format!(" of length {length}"));
    match text {
        Some(text) if text.chars().count() <= LONGEST => text,
        Some(text) => format!("{}...", text.chars().take(LONGEST).collect::<String>()),
        None => format!(
            "a {}{}",
            object.get_type().name().map_or_else(|_| "value".into(), |name| name.to_string()),
            length()
        ),
    }
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
        CatError::Memory { .. }
        | CatError::Interrupted { .. }
        | CatError::Torch { .. }
        | CatError::Kernel { .. }
        | CatError::Cuda { .. } => "KernelError",
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
    let number = source.raw_os_error();
    let described = match number {
        Some(number) => py.import("os").and_then(|os| os.call_method1("strerror", (number,))),
        None => Ok(PyString::new(py, &source.to_string()).into_any()),
    };
    let number = number.unwrap_or(libc::EINVAL);
    let instance = described.and_then(|text| py.get_type::<PyOSError>().call1((number, text, path.as_os_str())));
    instance.map_or_else(|error| error, PyErr::from_value)
}
