//! The Python module `cat_rs._core`: argument conversion, the GIL, and the one map from errors to exceptions.
//!
//! Shapes, dtypes and formulas are documented once, on the Python functions of `cat_rs` that call these.

mod adamw;
mod adapter_file;
mod cat_loss;
mod convert;
mod frozen_conv2d;
mod frozen_linear;
mod info;
mod lora_linear;
mod lora_up;
mod noising;
mod similarity;
mod statistics;

use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};

use pyo3::prelude::*;

use self::convert::raise;
use crate::cpu::interrupt;
use crate::error::{CatError, Result};

/// Runs `work` without the GIL and outside of autograd, and raises its error; a panic, which would be a bug, becomes an
/// error too.
fn released<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let outcome = py.allow_threads(|| {
        let _no_grad = tch::no_grad_guard();
        catch_unwind(AssertUnwindSafe(work))
    });
    let panicked = |_| Err(CatError::Kernel { op: "cat_rs", message: "a bug: the kernel panicked".into() });
    outcome.unwrap_or_else(panicked).map_err(|error| raise(py, &error))
}

/// As [`released`], for work that may take long: its loops end where a signal's handler raises, as that of Ctrl-C does.
fn interruptible<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    thread_local! {
        static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
    }
    fn stop() -> bool {
        Python::with_gil(|py| py.check_signals()).map_err(|error| RAISED.set(Some(error))).is_err()
    }
    let outcome = released(py, || interrupt::interruptible(stop, work));
    RAISED.take().map_or(outcome, Err)
}

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::adamw::{adamw_step, sum_of_squares};
    #[pymodule_export]
    use super::adapter_file::{adapter_layers, adapter_tensors, names_that_fit, read_safetensors, write_safetensors};
    #[pymodule_export]
    use super::cat_loss::{cat_loss, scale_gradients, student_loss};
    #[pymodule_export]
    use super::frozen_conv2d::{frozen_conv2d_backward, frozen_conv2d_forward};
    #[pymodule_export]
    use super::frozen_linear::{frozen_linear_backward, frozen_linear_forward};
    #[pymodule_export]
    use super::info::{build_info, compile_kernels, cuda_architectures, cuda_versions};
    #[pymodule_export]
    use super::lora_linear::{lora_linear_backward, lora_linear_forward};
    #[pymodule_export]
    use super::lora_up::{lora_up_backward, lora_up_forward};
    #[pymodule_export]
    use super::noising::noising;
    #[pymodule_export]
    use super::similarity::{cross_similarity, paired_similarity};
    #[pymodule_export]
    use super::statistics::{bootstrap_difference, bootstrap_interval, harmonic_mean, kps_difference};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::info::note_torch(module.py())
    }
}
