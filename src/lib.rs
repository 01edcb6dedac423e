//! Contrastive Adapter Training (arXiv 2404.07554) on libtorch tensors.
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod adapter_file;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod ops;
#[cfg(feature = "python")]
mod python;
pub mod tensor;
