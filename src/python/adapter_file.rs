//! Files of adapters, for `cat_rs.files`.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::convert::{optional, raise, wrap, wrap_optional};
use super::released;
use crate::adapter_file::{self, Family, Format, KnownModules, Layer, Metadata, NamedTensors};

/// A layer as Python has it: component, module, A, B, bias of B, magnitude, alpha.
type PyLayer = (String, String, PyTensor, PyTensor, Option<PyTensor>, Option<PyTensor>, Option<f64>);
type PyLayerOut = (String, String, PyObject, PyObject, Option<PyObject>, Option<PyObject>, Option<f64>);

fn named(tensors: Vec<(String, PyTensor)>) -> NamedTensors {
    tensors.into_iter().map(|(name, tensor)| (name, tensor.0)).collect()
}

fn wrap_named(py: Python<'_>, tensors: NamedTensors) -> PyResult<Vec<(String, PyObject)>> {
    tensors.into_iter().map(|(name, tensor)| Ok((name, wrap(py, tensor)?))).collect()
}

/// The tensors and the metadata of a safetensors file.
#[pyfunction]
pub fn read_safetensors(py: Python<'_>, path: PathBuf) -> PyResult<(Vec<(String, PyObject)>, Metadata)> {
    let (tensors, metadata) = released(py, move || adapter_file::read(&path))?;
    Ok((wrap_named(py, tensors)?, metadata))
}

/// Writes a safetensors file; an old file stays until the new one is whole.
#[pyfunction]
pub fn write_safetensors(
    py: Python<'_>,
    path: PathBuf,
    tensors: Vec<(String, PyTensor)>,
    metadata: Metadata,
) -> PyResult<()> {
    let tensors = named(tensors);
    released(py, move || adapter_file::write(&path, &tensors, &metadata))
}

/// The layers of a file's tensors: (format, family, layers).
#[pyfunction]
pub fn adapter_layers(
    py: Python<'_>,
    tensors: Vec<(String, PyTensor)>,
    known: KnownModules,
) -> PyResult<(&'static str, Option<&'static str>, Vec<PyLayerOut>)> {
    let tensors = named(tensors);
    let adapter = released(py, move || adapter_file::layers_of(tensors, &known))?;
    let layers = adapter.layers.into_iter().map(|layer| {
        let (lora_a, lora_b) = (wrap(py, layer.lora_a)?, wrap(py, layer.lora_b)?);
        let (bias, magnitude) = (wrap_optional(py, layer.bias)?, wrap_optional(py, layer.magnitude)?);
        Ok((layer.component, layer.module, lora_a, lora_b, bias, magnitude, layer.alpha))
    });
    Ok((adapter.format.name(), adapter.family.map(Family::name), layers.collect::<PyResult<_>>()?))
}

/// The tensors that a format has for layers.
#[pyfunction]
pub fn adapter_tensors(
    py: Python<'_>,
    layers: Vec<PyLayer>,
    format: &str,
    family: Option<&str>,
) -> PyResult<Vec<(String, PyObject)>> {
    let format = Format::parse(format).map_err(|error| raise(py, &error))?;
    let family = family.map(Family::parse).transpose().map_err(|error| raise(py, &error))?;
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
