//! The operations. Each folder holds its checks and dispatch (`mod.rs`), its CPU kernel (`cpu.rs`, slices only) and its
//! CUDA kernels (`kernel.cu`) with their launches (`cuda.rs`).

pub mod adamw;
pub mod cat_loss;
pub mod frozen_conv2d;
pub mod frozen_linear;
pub mod lora_linear;
pub mod lora_up;
pub mod noising;
mod product;
pub mod similarity;
pub mod statistics;

use tch::Kind;

use crate::cuda::{Variant, THREADS};

/// The dtype in which a kernel computes: f64 where an input is f64, else f32.
fn compute_kind(kinds: &[Kind]) -> Kind {
    if kinds.contains(&Kind::Double) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// [`compute_kind`] of one dtype.
fn real_of(kind: Kind) -> Kind {
    compute_kind(&[kind])
}

/// The name of a dtype in CUDA kernels.
fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::Double => "f64",
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    }
}

/// Elements that a block takes at once where each thread has `unroll` packs of 16 bytes of the widest dtype.
fn block_chunk(unroll: u64, kinds: &[Kind]) -> u64 {
    let widest = kinds.iter().map(|kind| kind.elt_size_in_bytes() as u64).max().unwrap_or(1);
    u64::from(THREADS) * unroll * 16 / widest.max(1)
}

/// The CUDA kernels of all operations, for tensors of one dtype.
pub fn kernels(kind: Kind) -> Vec<Variant> {
    vec![adamw::variant(kind), cat_loss::variant(kind), noising::variant(kind), similarity::variant(kind)]
}

/// PyTorch's intra-op thread count.
fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}
