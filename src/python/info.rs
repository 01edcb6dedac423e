//! What the extension was built with and what CUDA it finds, for `cat-rs info`.

use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyDict;
use tch::Kind;

use super::convert::{argument, raise};
use super::released;
use crate::cpu::{matmul_beats_library, parallel_available, simd_level};
use crate::cuda;
use crate::error::CatError;
use crate::ops;
use crate::tensor::FLOAT_DTYPES;

/// What this module was built with and runs on.
#[pyfunction]
pub fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("torch", env!("CAT_RS_TORCH"))?;
    info.set_item("simd", simd_level())?;
    info.set_item("matmul", if matmul_beats_library() { "cat-rs" } else { "PyTorch's library" })?;
    info.set_item("threads", if parallel_available() { "PyTorch's OpenMP" } else { "single" })?;
    Ok(info)
}

/// The CUDA versions of driver and compiler, and of each why there is none: ((version, reason), (version, reason)).
#[pyfunction]
#[allow(clippy::type_complexity)]
pub fn cuda_versions(
    py: Python<'_>,
) -> PyResult<((Option<String>, Option<String>), (Option<String>, Option<String>))> {
    released(py, || {
        let split = |version: std::result::Result<String, String>| match version {
            Ok(version) => (Some(version), None),
            Err(reason) => (None, Some(reason)),
        };
        Ok((split(cuda::driver_version()), split(cuda::compiler_version())))
    })
}

/// Compiles every CUDA kernel for tensors of one dtype and devices of one compute capability, 90 for 9.0, which need not
/// be there; returns the programs' names and the compiler's warnings.
#[pyfunction]
pub fn compile_kernels(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] architecture: u32,
    #[pyo3(from_py_with = argument)] dtype: PyBackedStr,
) -> PyResult<Vec<(String, String)>> {
    const OP: &str = "compile_kernels";
    let kind = match &*dtype {
        "float32" => Kind::Float,
        "float64" => Kind::Double,
        "bfloat16" => Kind::BFloat16,
        "float16" => Kind::Half,
        _ => return Err(raise(py, &CatError::value(OP, "dtype", FLOAT_DTYPES, format!("'{dtype}'")))),
    };
    released(py, || cuda::compile(OP, &ops::kernels(kind), architecture))
}

/// The compute capabilities that NVRTC compiles for, 90 for 9.0.
#[pyfunction]
pub fn cuda_architectures(py: Python<'_>) -> PyResult<Vec<u32>> {
    released(py, || cuda::architectures("info"))
}

/// Tells the part that looks for NVRTC which PyTorch there is.
pub fn note_torch(py: Python<'_>) -> PyResult<()> {
    let torch = py.import("torch")?;
    let file: PathBuf = torch.getattr("__file__")?.extract()?;
    let version = torch.getattr("version")?.getattr("cuda")?.extract()?;
    cuda::TorchCuda { version, folder: file.parent().map(Path::to_owned).unwrap_or_default() }.set();
    Ok(())
}
