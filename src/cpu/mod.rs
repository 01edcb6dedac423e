//! What the CPU kernels share: elements of four float dtypes, threads, and SIMD chosen at run time.

mod element;
pub mod interrupt;
#[cfg(target_arch = "x86_64")]
pub mod matmul;
mod threads;

pub use element::{DisjointMut, ElementKind, Elements, ElementsMut, Real};
pub use threads::{for_each_task, parallel_available};

use crate::error::{CatError, Result};

/// Evaluates an expression compiled for the widest SIMD of this processor.
///
/// Only what is inlined into it is compiled that way: helpers carry `#[inline(always)]`. A macro, because its closure
/// must carry it too: without it everything still works, at the speed of the oldest processor.
macro_rules! vectorized {
    ($work:expr) => {
        $crate::cpu::dispatch(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use vectorized;

/// What `vectorized` calls.
#[inline(always)]
pub(crate) fn dispatch<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// `len` times `value`, or an error where no memory holds it: `vec!` would end the process. `argument` decides `len`.
pub fn filled<T: Clone>(op: &'static str, argument: &'static str, len: usize, value: T) -> Result<Vec<T>> {
    let mut values = Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    values.try_reserve_exact(len).map_err(|_| CatError::Memory { op, argument, bytes })?;
    values.resize(len, value);
    Ok(values)
}

/// The SIMD level that `vectorized` uses on this processor.
pub fn simd_level() -> String {
    format!("{:?}", pulp::Arch::new()).split(['(', ' ', '{']).next().unwrap_or_default().to_lowercase()
}

/// Whether float32 matrix products run faster here than in PyTorch's matrix library.
pub fn matmul_beats_library() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matmul::beats_library();
    #[cfg(not(target_arch = "x86_64"))]
    false
}
