//! The operations. Each folder holds its checks and dispatch (`mod.rs`) and its CPU kernel (`cpu.rs`, slices only).

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

/// The dtype in which a kernel computes: f64 where an input is f64, else f32.
fn compute_kind(kinds: &[Kind]) -> Kind {
    if kinds.contains(&Kind::Double) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// PyTorch's intra-op thread count.
fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}
