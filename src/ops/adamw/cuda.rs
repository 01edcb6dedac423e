//! Launches of AdamW.

use tch::{Device, Kind, Tensor};

use super::{AdamW, OP};
use crate::cuda::{Define, Kernel, Program, Scalar, Stream, Variant};
use crate::error::{Result, TorchContext};
use crate::ops::{block_chunk, dtype, real_of};
use crate::tensor::{address, optional_address};

static PROGRAM: Program = Program { name: "adamw", source: include_str!("kernel.cu") };

/// Packs of one tensor that a thread has under way, in the two kernels over all elements: UNROLL of kernel.cu.
const SQUARES_UNROLL: u64 = 8;
const UPDATE_UNROLL: u64 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct SquaresParameter {
    grad: u64,
    len: u64,
    partials: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumParameter {
    partials: u64,
    count: u64,
    sum: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PrepareParameter {
    settings: Scalar,
    sums: u64,
    sum_count: u64,
    count: u64,
    skipped: u64,
    step: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UpdateParameter {
    param: u64,
    grad: u64,
    exp_avg: u64,
    exp_avg_sq: u64,
    low_precision: u64,
    step: u64,
    len: u64,
}

/// Numbers of `Step` in kernel.cu.
const STEP_NUMBERS: i64 = 9;

fn defines(real: Kind, grad: Kind, low_precision: Kind) -> [Define; 3] {
    [("REAL", dtype(real)), ("GRAD", dtype(grad)), ("LOW", dtype(low_precision))]
}

/// The kernels for gradients and weights of one dtype.
pub fn variant(kind: Kind) -> Variant {
    Variant { program: &PROGRAM, defines: defines(real_of(kind), kind, kind).to_vec() }
}

/// Puts the sum of squares of `grad` at the address `sum`, in f64.
pub fn sum_of_squares(stream: &Stream, on: Device, grad: &Tensor, sum: u64) -> Result<()> {
    let kind = grad.f_kind().during(OP)?;
    let len = grad.numel() as u64;
    let blocks = stream.blocks(len.div_ceil(block_chunk(SQUARES_UNROLL, &[kind])));
    let partials = Tensor::f_empty([i64::from(blocks)], (Kind::Double, on)).during(OP)?;
    let partials = address(OP, &partials)?;
    let defines = defines(real_of(kind), kind, kind);
    let kernel = |name| Kernel { program: &PROGRAM, defines: &defines, name };
    let squares = SquaresParameter { grad: address(OP, grad)?, len, partials };
    let total = SumParameter { partials, count: blocks.into(), sum };
    // SAFETY: Squares and Sum of kernel.cu, on PyTorch's memory.
    unsafe {
        stream.launch(kernel(c"squares"), [blocks, 1], &squares)?;
        stream.launch(kernel(c"sum_partials"), [1, 1], &total)
    }
}

/// One step over the buffers; the gradients are zero afterwards.
pub fn adamw(stream: &Stream, on: Device, problem: &AdamW) -> Result<()> {
    let kind = |tensor: &Tensor| tensor.f_kind().during(OP);
    let (real, grad) = (kind(problem.param)?, kind(problem.grad)?);
    let low_precision = problem.low_precision.as_deref().map_or(Ok(grad), kind)?;
    let step = Tensor::f_empty([STEP_NUMBERS], (real, on)).during(OP)?;
    let step = address(OP, &step)?;
    let prepare = PrepareParameter {
        settings: Scalar::device(address(OP, problem.settings)?, kind(problem.settings)? == Kind::Double),
        sums: address(OP, problem.sums)?,
        sum_count: problem.sums.numel() as u64,
        count: address(OP, problem.step)?,
        skipped: optional_address(OP, problem.skipped.as_deref())?,
        step,
    };
    let len = problem.param.numel() as u64;
    let update = UpdateParameter {
        param: address(OP, problem.param)?,
        grad: address(OP, problem.grad)?,
        exp_avg: address(OP, problem.exp_avg)?,
        exp_avg_sq: address(OP, problem.exp_avg_sq)?,
        low_precision: optional_address(OP, problem.low_precision.as_deref())?,
        step,
        len,
    };
    let blocks = stream.blocks(len.div_ceil(block_chunk(UPDATE_UNROLL, &[real, grad, low_precision])));
    let defines = defines(real, grad, low_precision);
    let kernel = |name| Kernel { program: &PROGRAM, defines: &defines, name };
    // SAFETY: Prepare and Update of kernel.cu, on PyTorch's memory.
    unsafe {
        stream.launch(kernel(c"prepare"), [1, 1], &prepare)?;
        stream.launch(kernel(c"adamw"), [blocks, 1], &update)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::fake;

    const LENGTH: i64 = 5003;

    fn random(kind: Kind) -> Tensor {
        Tensor::f_randn([LENGTH], (Kind::Float, Device::Cpu)).unwrap().f_to_kind(kind).unwrap()
    }

    #[test]
    fn a_step_equals_the_cpus() {
        for (kind, last) in [(Kind::Float, 0.0), (Kind::BFloat16, 0.0), (Kind::Double, 0.0), (Kind::Float, f64::NAN)] {
            let real = real_of(kind);
            let start = [random(real), random(kind), random(real), random(real).f_abs().unwrap()];
            let _ = start[1].f_get(0).unwrap().f_fill_(last).unwrap();
            let low = (kind == Kind::BFloat16).then(|| random(kind));
            let settings = Tensor::f_from_slice(&[0.01, 0.8, 0.95, 1e-6, 0.1, 0.5]).unwrap();
            let run = |on_gpu: bool| {
                let [mut param, mut grad, mut exp_avg, mut exp_avg_sq] = start.each_ref().map(Tensor::copy);
                let mut low = low.as_ref().map(Tensor::copy);
                let mut sums = Tensor::f_zeros([2], (Kind::Double, Device::Cpu)).unwrap();
                let mut step = Tensor::f_full(&[] as &[i64], 3.0, (Kind::Float, Device::Cpu)).unwrap();
                let mut skipped = Tensor::f_zeros(&[] as &[i64], (Kind::Int64, Device::Cpu)).unwrap();
                if on_gpu {
                    let sum = address(OP, &sums).unwrap() + 8;
                    fake::with_stream(OP, |stream| sum_of_squares(stream, Device::Cpu, &grad, sum).unwrap());
                } else {
                    super::super::sum_of_squares(&grad, &mut sums, 1, 0).unwrap();
                }
                let problem = AdamW {
                    param: &mut param,
                    grad: &mut grad,
                    exp_avg: &mut exp_avg,
                    exp_avg_sq: &mut exp_avg_sq,
                    low_precision: low.as_mut(),
                    settings: &settings,
                    sums: &sums,
                    step: &mut step,
                    skipped: Some(&mut skipped),
                    stream: 0,
                };
                if on_gpu {
                    fake::with_stream(OP, |stream| adamw(stream, Device::Cpu, &problem).unwrap());
                } else {
                    super::super::adamw(problem).unwrap();
                }
                let written = [param, grad, exp_avg, exp_avg_sq, sums].into_iter().chain(low);
                (written.collect::<Vec<_>>(), step.f_double_value(&[]), skipped.f_int64_value(&[]))
            };
            let ((ours, our_step, our_skipped), (theirs, step, skipped)) = (run(true), run(false));
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert!(ours.f_allclose(theirs, 1e-5, 1e-6, true).unwrap());
            }
            let counts = (step.unwrap(), skipped.unwrap());
            assert_eq!((our_step.unwrap(), our_skipped.unwrap()), counts);
            assert_eq!(counts, if last.is_nan() { (3.0, 1) } else { (4.0, 0) });
        }
    }
}
