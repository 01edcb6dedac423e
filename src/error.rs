//! Every failure of the crate. Each variant names the operation, the argument, what was expected and what came.

use std::io;
use std::path::{Path, PathBuf};

use tch::TchError;
use thiserror::Error;

/// The result of every fallible function of the crate.
pub type Result<T> = std::result::Result<T, CatError>;

/// A failure with enough context to fix the call that caused it.
#[derive(Debug, Error)]
pub enum CatError {
    /// A tensor has another shape than the operation needs.
    #[error("{op}: `{argument}` must have shape {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The shape that was expected.
        expected: String,
        /// The shape that came.
        got: String,
    },
    /// A tensor has an element type that the operation does not handle.
    #[error("{op}: `{argument}` must have dtype {expected}, got {got}")]
    Dtype {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The dtypes that are handled.
        expected: &'static str,
        /// The dtype that came.
        got: String,
    },
    /// A tensor lives on a device that the operation does not handle.
    #[error("{op}: `{argument}` must be on {expected}, got a tensor on {got}")]
    Device {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The device that was expected.
        expected: String,
        /// The device that came.
        got: String,
    },
    /// A tensor has a memory layout that the operation does not handle.
    #[error("{op}: `{argument}` must be {expected}, got {got}")]
    Layout {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The layout that was expected.
        expected: &'static str,
        /// The layout that came.
        got: String,
    },
    /// A value is outside its domain.
    #[error("{op}: `{argument}` must be {expected}, got {got}")]
    Value {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The domain.
        expected: String,
        /// The value that came.
        got: String,
    },
    /// There is not enough memory for what a kernel keeps.
    #[error("{op}: not enough memory for the {bytes} bytes that `{argument}` takes")]
    Memory {
        /// The operation.
        op: &'static str,
        /// The argument whose size decides.
        argument: &'static str,
        /// How many bytes were wanted.
        bytes: usize,
    },
    /// Somebody asked a long loop to stop.
    #[error("{op}: interrupted")]
    Interrupted {
        /// The operation.
        op: &'static str,
    },
    /// libtorch reported a failure.
    #[error("{op}: libtorch: {message}")]
    Torch {
        /// The operation.
        op: &'static str,
        /// The first line of libtorch's message; the rest is a C++ backtrace.
        message: String,
    },
    /// A kernel failed on one of its threads.
    #[error("{op}: the kernel failed: {message}")]
    Kernel {
        /// The operation.
        op: &'static str,
        /// What failed.
        message: String,
    },
    /// CUDA or its compiler reported a failure, or is not there.
    #[error("{op}: CUDA: {message}")]
    Cuda {
        /// The operation.
        op: &'static str,
        /// What failed, and CUDA's own name and text of the failure.
        message: String,
    },
    /// A file could not be read or written.
    #[error("{op}: {}: {source}", path.display())]
    Io {
        /// The operation.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file, or a set of tensors, is not an adapter that can be used as asked.
    #[error("{op}: {message}")]
    Adapter {
        /// The operation.
        op: &'static str,
        /// What was expected and what came.
        message: String,
    },
}

impl CatError {
    /// What the operating system said about a file.
    pub fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { op, path: path.to_owned(), source }
    }

    /// A failure of CUDA.
    pub fn cuda(op: &'static str, message: impl Into<String>) -> Self {
        Self::Cuda { op, message: message.into() }
    }

    /// An adapter that cannot be used as asked.
    pub fn adapter(op: &'static str, message: impl Into<String>) -> Self {
        Self::Adapter { op, message: message.into() }
    }

    /// A value outside its domain.
    pub fn value(op: &'static str, argument: &'static str, expected: impl Into<String>, got: impl ToString) -> Self {
        Self::Value { op, argument, expected: expected.into(), got: got.to_string() }
    }

    /// A shape that does not fit; shapes print as Python lists.
    pub fn shape(op: &'static str, argument: &'static str, expected: impl Into<String>, got: &[i64]) -> Self {
        Self::Shape { op, argument, expected: expected.into(), got: format!("{got:?}") }
    }

    /// The same failure in the operation `name`, for what several operations share.
    pub fn of(mut self, name: &'static str) -> Self {
        let (Self::Shape { op, .. }
        | Self::Dtype { op, .. }
        | Self::Device { op, .. }
        | Self::Layout { op, .. }
        | Self::Value { op, .. }
        | Self::Memory { op, .. }
        | Self::Interrupted { op }
        | Self::Torch { op, .. }
        | Self::Kernel { op, .. }
        | Self::Cuda { op, .. }
        | Self::Io { op, .. }
        | Self::Adapter { op, .. }) = &mut self;
        *op = name;
        self
    }

    /// A libtorch message without its backtrace.
    pub fn torch_message(op: &'static str, message: &str) -> Self {
        const ALLOCATION: &str = "you tried to allocate ";
        let line = message.lines().find(|line| !line.trim().is_empty()).unwrap_or("an error without a text");
        let bytes = line.split_once(ALLOCATION).and_then(|(_, rest)| rest.split(' ').next());
        Self::Torch {
            op,
            message: bytes.map_or(line.to_owned(), |bytes| format!("not enough memory for {bytes} bytes")),
        }
    }
}

/// Names the operation in which libtorch failed.
pub trait TorchContext<T> {
    /// Turns a libtorch failure into a [`CatError`] of operation `op`.
    fn during(self, op: &'static str) -> Result<T>;
}

impl<T> TorchContext<T> for std::result::Result<T, TchError> {
    fn during(self, op: &'static str) -> Result<T> {
        self.map_err(|error| match error {
            TchError::Torch(message) => CatError::torch_message(op, &message),
            other => CatError::torch_message(op, &other.to_string()),
        })
    }
}
