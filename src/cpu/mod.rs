//! What the CPU kernels share: elements of four float dtypes, threads, and SIMD chosen at run time.

mod element;
mod threads;

pub use element::{DisjointMut, ElementKind, Elements, ElementsMut, Real};
pub use threads::{for_each_task, parallel_available};

/// Runs `work` compiled for the widest SIMD of this processor.
///
/// Only what is inlined into `work` is compiled that way: helpers carry `#[inline(always)]`.
#[inline(always)]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// The SIMD level that [`vectorized`] uses on this processor.
pub fn simd_level() -> String {
    format!("{:?}", pulp::Arch::new()).split(['(', ' ', '{']).next().unwrap_or_default().to_lowercase()
}
