//! Launches of noising.

use tch::{Kind, Tensor};

use super::{PredictionType, OP};
use crate::cuda::{Define, Kernel, Program, Stream, Variant};
use crate::error::{Result, TorchContext};
use crate::ops::{block_chunk, dtype, real_of};
use crate::tensor::{address, optional_address};

static PROGRAM: Program = Program { name: "noising", source: include_str!("kernel.cu") };

/// Packs of one tensor that a thread has under way: UNROLL of kernel.cu.
const UNROLL: u64 = 2;

/// Contiguous tensors of one device.
#[derive(Debug)]
pub struct Problem<'t> {
    /// x, [B, ...].
    pub latents: &'t Tensor,
    /// n, of the same shape.
    pub noise: &'t Tensor,
    /// Factor of x in z, [B], in `kind`.
    pub signal: &'t Tensor,
    /// Factor of n in z, [B], in `kind`.
    pub sigma: &'t Tensor,
    /// z, [copies * B, ...], in the latents' dtype.
    pub noisy: &'t Tensor,
    /// How often z is written.
    pub copies: u64,
    /// The target, in the noise's dtype; `None` where it is the noise itself.
    pub target: Option<&'t Tensor>,
    /// What the target is.
    pub prediction_type: PredictionType,
    /// The dtype to compute in.
    pub kind: Kind,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Parameter {
    latents: u64,
    noise: u64,
    signal: u64,
    sigma: u64,
    noisy: u64,
    target: u64,
    copies: u64,
    batch: u64,
    row: u64,
    flow: u64,
}

fn defines(kind: Kind, latents: Kind, noise: Kind) -> [Define; 3] {
    [("REAL", dtype(kind)), ("LATENT", dtype(latents)), ("NOISE", dtype(noise))]
}

/// The kernels for tensors of one dtype.
pub fn variant(kind: Kind) -> Variant {
    Variant { program: &PROGRAM, defines: defines(real_of(kind), kind, kind).to_vec() }
}

/// Writes the noisy batch and the target.
pub fn noising(stream: &Stream, problem: &Problem) -> Result<()> {
    let kinds = [problem.latents.f_kind().during(OP)?, problem.noise.f_kind().during(OP)?];
    let batch = problem.signal.numel() as u64;
    let row = problem.latents.numel() as u64 / batch;
    let parameter = Parameter {
        latents: address(OP, problem.latents)?,
        noise: address(OP, problem.noise)?,
        signal: address(OP, problem.signal)?,
        sigma: address(OP, problem.sigma)?,
        noisy: address(OP, problem.noisy)?,
        target: optional_address(OP, problem.target)?,
        copies: problem.copies,
        batch,
        row,
        flow: (problem.prediction_type == PredictionType::Flow).into(),
    };
    let blocks = stream.blocks(batch * row.div_ceil(block_chunk(UNROLL, &kinds)));
    let defines = defines(problem.kind, kinds[0], kinds[1]);
    let kernel = Kernel { program: &PROGRAM, defines: &defines, name: c"noising" };
    // SAFETY: Noising of kernel.cu, on PyTorch's memory.
    unsafe { stream.launch(kernel, [blocks, 1], &parameter) }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::cuda::fake;

    #[test]
    fn launches_equal_the_cpus_kernel() {
        let types = [PredictionType::Epsilon, PredictionType::Velocity, PredictionType::Flow];
        for (prediction_type, kinds) in
            types.into_iter().zip([[Kind::Float; 2], [Kind::BFloat16, Kind::Float], [Kind::Half; 2]])
        {
            let random =
                |kind| Tensor::f_randn([3, 4, 33, 30], (Kind::Float, Device::Cpu)).unwrap().f_to_kind(kind).unwrap();
            let (latents, noise) = (random(kinds[0]), random(kinds[1]));
            let signal = Tensor::f_from_slice(&[0.9f32, 0.5, 0.1]).unwrap();
            let sigma = Tensor::f_from_slice(&[0.1f32, 0.7, 0.99]).unwrap();
            let (expected, expected_target) =
                super::super::noising(&latents, &noise, &signal, &sigma, prediction_type, 2, 0).unwrap();
            fake::with_stream(OP, |stream| {
                let noisy = Tensor::f_full([6, 4, 33, 30], f64::NAN, (kinds[0], Device::Cpu)).unwrap();
                let target = Tensor::f_full([3, 4, 33, 30], f64::NAN, (kinds[1], Device::Cpu)).unwrap();
                let has_target = prediction_type != PredictionType::Epsilon;
                let problem = Problem {
                    latents: &latents,
                    noise: &noise,
                    signal: &signal,
                    sigma: &sigma,
                    noisy: &noisy,
                    copies: 2,
                    target: has_target.then_some(&target),
                    prediction_type,
                    kind: Kind::Float,
                };
                noising(stream, &problem).unwrap();
                assert!(noisy.f_allclose(&expected, 8e-3, 1e-6, false).unwrap());
                assert!(!has_target || target.f_allclose(&expected_target, 1e-3, 1e-6, false).unwrap());
            });
        }
    }
}
