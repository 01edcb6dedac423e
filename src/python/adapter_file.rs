//! Files of adapters, for `cat_rs.adapter_file`.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use super::convert::{argument, optional, path, raise, wrap, wrap_optional, Expected, PyTensor};
use super::released;
use crate::adapter_file::{self, Family, Format, KnownModules, Layer, Metadata, NamedTensors, Source};
use crate::error::CatError;

/// A layer as Python has it: component, module, A, B, bias of B, magnitude, alpha.
type PyLayer = (String, String, PyTensor, PyTensor, Option<PyTensor>, Option<PyTensor>, Option<f64>);
type PyLayerOut = (String, String, PyObject, PyObject, Option<PyObject>, Option<PyObject>, Option<f64>);

impl Expected for Vec<PyLayer> {
    const EXPECTED: &'static str =
        "a sequence of layers, tuples of component, module, A, B, bias, magnitude and alpha";
}

impl Expected for Vec<String> {
    const EXPECTED: &'static str = "a sequence of texts";
}

impl Expected for Vec<(String, PySource)> {
    const EXPECTED: &'static str = "a sequence of (name, tensor or (dtype, shape, parts))";
}

impl Expected for Vec<(String, Bound<'_, PyAny>)> {
    const EXPECTED: &'static str = "a sequence of (name, tensor)";
}

/// Tensors that have names, which errors tell.
fn named(py: Python<'_>, op: &'static str, tensors: Vec<(String, Bound<'_, PyAny>)>) -> PyResult<NamedTensors> {
    let tensor = |(name, tensor): (String, Bound<'_, PyAny>)| match tensor.extract::<PyTensor>() {
        Ok(tensor) => Ok((name, tensor.0)),
        Err(error) => Err(raise(py, &CatError::adapter(op, format!("`{name}`: {}", error.value(py))))),
    };
    tensors.into_iter().map(tensor).collect()
}

fn wrap_named(py: Python<'_>, tensors: NamedTensors) -> PyResult<Vec<(String, PyObject)>> {
    tensors.into_iter().map(|(name, tensor)| Ok((name, wrap(py, tensor)?))).collect()
}

/// The tensors and the metadata of a safetensors file.
#[pyfunction]
pub fn read_safetensors(
    py: Python<'_>,
    #[pyo3(from_py_with = path)] path: PathBuf,
) -> PyResult<(Vec<(String, PyObject)>, Metadata)> {
    let (tensors, metadata) = released(py, move || adapter_file::read(&path))?;
    Ok((wrap_named(py, tensors)?, metadata))
}

/// A tensor; or the dtype and the shape of one, and an iterator of its parts.
#[derive(FromPyObject)]
pub enum PySource {
    Whole(PyTensor),
    Parts(String, Vec<usize>, PyObject),
}

/// A Python iterator of tensors, asked with the GIL; what it raises ends it and is kept.
struct PyParts {
    iterator: PyObject,
    raised: Arc<Mutex<Option<PyErr>>>,
}

impl Iterator for PyParts {
    type Item = tch::Tensor;

    fn next(&mut self) -> Option<tch::Tensor> {
        let next = Python::with_gil(|py| {
            let mut iterator = self.iterator.bind(py).try_iter()?;
            iterator.next().map(|part| part?.extract::<PyTensor>()).transpose()
        });
        next.unwrap_or_else(|error| {
            *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            None
        })
        .map(|part| part.0)
    }
}

/// Writes a safetensors file into the open file `descriptor`, from where it is; `path` names it in errors.
#[pyfunction]
pub fn write_safetensors(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] descriptor: RawFd,
    #[pyo3(from_py_with = path)] path: PathBuf,
    #[pyo3(from_py_with = argument)] tensors: Vec<(String, PySource)>,
    #[pyo3(from_py_with = argument)] metadata: Metadata,
) -> PyResult<()> {
    let file =
        open_again(descriptor).map_err(|source| raise(py, &CatError::io("write_safetensors", &path, source)))?;
    let raised = Arc::new(Mutex::new(None));
    let source = |source| match source {
        PySource::Whole(tensor) => Source::Whole(tensor.0),
        PySource::Parts(dtype, shape, iterator) => {
            Source::Parts { dtype, shape, parts: Box::new(PyParts { iterator, raised: raised.clone() }) }
        }
    };
    let tensors = tensors.into_iter().map(|(name, tensor)| (name, source(tensor))).collect();
    let written = released(py, move || adapter_file::write(file, &path, tensors, metadata));
    let error = raised.lock().unwrap_or_else(PoisonError::into_inner).take();
    error.map_or(written, Err)
}

/// A handle of our own: Python may close its own while the GIL is released.
fn open_again(descriptor: RawFd) -> io::Result<File> {
    if descriptor < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the borrow ends with this line; a number that is no open file is an error of the system call.
    unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned().map(File::from)
}

/// The layers of tensors by name: (format, family, layers). `saving` says which function errors are of.
#[pyfunction]
pub fn adapter_layers(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] tensors: Vec<(String, Bound<'_, PyAny>)>,
    #[pyo3(from_py_with = argument)] known: KnownModules,
    saving: bool,
) -> PyResult<(&'static str, Option<&'static str>, Vec<PyLayerOut>)> {
    let op = if saving { "save_lora" } else { "load_lora" };
    let tensors = named(py, op, tensors)?;
    let adapter = released(py, move || adapter_file::layers_of(op, tensors, &known))?;
    let layers = adapter.layers.into_iter().map(|layer| {
        let (lora_a, lora_b) = (wrap(py, layer.lora_a)?, wrap(py, layer.lora_b)?);
        let (bias, magnitude) = (wrap_optional(py, layer.bias)?, wrap_optional(py, layer.magnitude)?);
        Ok((layer.component, layer.module, lora_a, lora_b, bias, magnitude, layer.alpha))
    });
    Ok((adapter.format.name(), adapter.family.map(Family::name), layers.collect::<PyResult<_>>()?))
}

/// Which names a pattern of a LoraConfig fits.
#[pyfunction]
pub fn names_that_fit(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] pattern: PyBackedStr,
    #[pyo3(from_py_with = argument)] names: Vec<String>,
) -> PyResult<Vec<bool>> {
    released(py, move || adapter_file::names_that_fit(&pattern, &names))
}

/// The tensors that a format has for layers.
#[pyfunction]
pub fn adapter_tensors(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] layers: Vec<PyLayer>,
    #[pyo3(from_py_with = argument)] format: PyBackedStr,
    #[pyo3(from_py_with = argument)] family: Option<PyBackedStr>,
) -> PyResult<Vec<(String, PyObject)>> {
    let format = Format::parse(&format).map_err(|error| raise(py, &error))?;
    let family = family.map(|family| Family::parse(&family)).transpose().map_err(|error| raise(py, &error))?;
    let layers: Vec<Layer> = layers
        .into_iter()
        .map(|(component, module, lora_a, lora_b, bias, magnitude, alpha)| Layer {
            component,
            module,
            lora_a: lora_a.0,
            lora_b: lora_b.0,
            bias: optional(bias),
            magnitude: optional(magnitude),
            alpha,
        })
        .collect();
    let tensors = released(py, move || adapter_file::tensors_of(&layers, format, family))?;
    wrap_named(py, tensors)
}
