//! Launches of the CAT loss.

use std::ffi::CStr;

use tch::{Device, Kind, Tensor};

use super::{GpuValues, OP};
use crate::cuda::{Define, Kernel, Program, Scalar, Stream, Variant};
use crate::error::{Result, TorchContext};
use crate::ops::{block_chunk, dtype, real_of};
use crate::tensor::{address, optional_address};

static PROGRAM: Program = Program { name: "cat_loss", source: include_str!("kernel.cu") };

/// Packs of one tensor that a thread has under way: UNROLL of kernel.cu.
const UNROLL: u64 = 4;

/// One squared-error term over contiguous tensors.
#[derive(Debug)]
pub struct Term<'t> {
    /// The prediction.
    pub pred: &'t Tensor,
    /// What it is compared with.
    pub target: &'t Tensor,
    /// Where the gradient with respect to `pred` goes, in its dtype, if wanted.
    pub grad: Option<&'t Tensor>,
    /// w, [B], contiguous.
    pub weights: Option<&'t Tensor>,
    /// The mask's rows, contiguous, and the length of a row: one row, or one a sample.
    pub mask: Option<(&'t Tensor, u64)>,
}

/// Everything of the loss, on the device; weights and mask in the dtype that the kernel computes in.
#[derive(Debug)]
pub struct Problem<'t> {
    /// The diffusion term and, if there is one, the preservation term.
    pub terms: Vec<Term<'t>>,
    /// The device.
    pub on: Device,
    /// The dtype to compute in.
    pub kind: Kind,
    /// Elements a sample.
    pub per_sample: u64,
    /// Whether the mean is over the mask's weight instead of over all elements.
    pub mask_normalize: bool,
    /// The weight of the preservation term.
    pub cat_factor: Scalar,
    /// The gradients' factor.
    pub scale: Scalar,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TermParameter {
    pred: u64,
    target: u64,
    grad: u64,
    is_cat: u64,
    weights: u64,
    mask: u64,
    mask_sums: u64,
    share: f64,
    batch: u64,
    rows_per_sample: u64,
    row: u64,
    mask_per_sample: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LossParameter {
    terms: [TermParameter; 2],
    partials: u64,
    cat_factor: Scalar,
    scale: Scalar,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ValuesParameter {
    partials: u64,
    diffusion_count: u64,
    cat_count: u64,
    cat_factor: Scalar,
    total: u64,
    parts: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MaskSumsParameter {
    mask: u64,
    sums: u64,
    row: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScalingParameter {
    grads: [u64; 2],
    len: u64,
    factor: Scalar,
}

fn defines(kind: Kind, pred: Kind, target: Kind) -> [Define; 3] {
    [("REAL", dtype(kind)), ("PRED", dtype(pred)), ("TARGET", dtype(target))]
}

/// The kernels for tensors of one dtype.
pub fn variant(kind: Kind) -> Variant {
    Variant { program: &PROGRAM, defines: defines(real_of(kind), kind, kind).to_vec() }
}

impl Term<'_> {
    fn batch(&self) -> u64 {
        self.pred.size()[0] as u64
    }

    /// The length of a row: of the mask's, or a whole sample.
    fn row(&self, per_sample: u64) -> u64 {
        self.mask.map_or(per_sample, |(_, row)| row)
    }

    fn mask_rows(&self) -> u64 {
        self.mask.map_or(0, |(mask, row)| mask.numel() as u64 / row)
    }
}

/// The values of the loss; writes the gradients that are wanted.
pub fn cat_loss(stream: &Stream, problem: &Problem) -> Result<GpuValues> {
    let Problem { on, kind, per_sample, ref terms, .. } = *problem;
    let kinds = terms.iter().map(|term| Ok((term.pred.f_kind()?, term.target.f_kind()?)));
    let kinds = kinds.collect::<tch::Result<Vec<_>>>().during(OP)?;
    let all_kinds: Vec<Kind> = kinds.iter().flat_map(|(pred, target)| [*pred, *target]).collect();
    let chunk = block_chunk(UNROLL, &all_kinds);
    let chunks = |term: &Term| {
        let row = term.row(per_sample);
        term.batch() * (per_sample / row) * row.div_ceil(chunk)
    };
    let blocks = stream.blocks(terms.iter().map(chunks).max().unwrap_or(1));

    let normalized_rows = |term: &Term| if problem.mask_normalize { term.mask_rows() } else { 0 };
    let partials = u64::from(blocks) * terms.len() as u64;
    let sums = terms.iter().map(normalized_rows).sum::<u64>();
    let workspace = Tensor::f_empty([(partials + sums) as i64], (Kind::Double, on)).during(OP)?;
    let partials = address(OP, &workspace)?;
    let mut mask_sums = partials + 8 * u64::from(blocks) * terms.len() as u64;
    let (pred, target) = kinds[0];
    let common = defines(kind, pred, target);
    let mut parameters = Vec::with_capacity(2);
    for (term, is_cat) in terms.iter().zip(0u64..) {
        let (row, rows) = (term.row(per_sample), normalized_rows(term));
        let mask = optional_address(OP, term.mask.map(|(mask, _)| mask))?;
        if rows > 0 {
            let parameter = MaskSumsParameter { mask, sums: mask_sums, row };
            let blocks = u32::try_from(rows).unwrap_or(u32::MAX);
            // SAFETY: MaskSums of kernel.cu, on PyTorch's memory.
            unsafe { stream.launch(kernel(c"mask_sums", &common), [blocks, 1], &parameter)? };
        }
        parameters.push(TermParameter {
            pred: address(OP, term.pred)?,
            target: address(OP, term.target)?,
            grad: optional_address(OP, term.grad)?,
            is_cat,
            weights: optional_address(OP, term.weights)?,
            mask,
            mask_sums: if rows > 0 { mask_sums } else { 0 },
            share: 1.0 / (term.batch() as f64 * per_sample as f64),
            batch: term.batch(),
            rows_per_sample: per_sample / row,
            row,
            mask_per_sample: (term.mask_rows() > 1).into(),
        });
        mask_sums += 8 * rows;
    }
    let terms = parameters;
    let mut parameter = LossParameter {
        terms: [terms[0], *terms.last().unwrap_or(&terms[0])],
        partials,
        cat_factor: problem.cat_factor,
        scale: problem.scale,
    };
    if kinds.iter().all(|other| *other == kinds[0]) {
        // SAFETY: CatLoss of kernel.cu, on PyTorch's memory.
        unsafe { stream.launch(kernel(c"cat_loss", &common), [blocks, terms.len() as u32], &parameter)? };
    } else {
        for (index, (term, (pred, target))) in (0u64..).zip(terms.iter().zip(&kinds)) {
            parameter.terms = [*term; 2];
            parameter.partials = partials + 8 * index * u64::from(blocks);
            let defines = defines(kind, *pred, *target);
            // SAFETY: as above.
            unsafe { stream.launch(kernel(c"cat_loss", &defines), [blocks, 1], &parameter)? };
        }
    }

    let values = GpuValues {
        total: Tensor::f_empty(&[] as &[i64], (kind, on)).during(OP)?,
        parts: Tensor::f_empty([2], (kind, on)).during(OP)?,
    };
    let parameter = ValuesParameter {
        partials,
        diffusion_count: blocks.into(),
        cat_count: (terms.len() as u64 - 1) * u64::from(blocks),
        cat_factor: problem.cat_factor,
        total: address(OP, &values.total)?,
        parts: address(OP, &values.parts)?,
    };
    // SAFETY: Values of kernel.cu, on PyTorch's memory.
    unsafe { stream.launch(kernel(c"cat_loss_values", &common), [1, 1], &parameter)? };
    Ok(values)
}

/// Multiplies one or two gradients, contiguous, of one dtype and length, by a factor.
pub fn scale_gradients(stream: &Stream, grads: &[Option<&Tensor>], kind: Kind, factor: Scalar) -> Result<()> {
    let len = grads.iter().flatten().map(|grad| grad.numel() as u64).max().unwrap_or(0);
    let at = |index: usize| optional_address(OP, grads.get(index).copied().flatten());
    let parameter = ScalingParameter { grads: [at(0)?, at(1)?], len, factor };
    let defines = defines(real_of(kind), kind, kind);
    let blocks = stream.blocks(len.div_ceil(block_chunk(1, &[kind])));
    // SAFETY: Scaling of kernel.cu, on PyTorch's memory.
    unsafe { stream.launch(kernel(c"scale_gradients", &defines), [blocks, grads.len() as u32], &parameter) }
}

fn kernel<'a>(name: &'static CStr, defines: &'a [Define]) -> Kernel<'a> {
    Kernel { program: &PROGRAM, defines, name }
}

#[cfg(test)]
mod tests {
    use super::super::{cat_loss_into, CatLoss, Factor, LossValues, Pair};
    use super::*;
    use crate::cuda::fake;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::f_randn(shape, (Kind::Float, Device::Cpu)).unwrap().f_to_kind(kind).unwrap()
    }

    /// The values and gradients are those of the CPU's kernel.
    fn check(kinds: [Kind; 4], masked: bool, mask_normalize: bool, preserve: bool) {
        let (shape, preserved) = ([3, 2, 64, 40], [5, 2, 64, 40]);
        let [pred, target] = [kinds[0], kinds[1]].map(|kind| random(&shape, kind));
        let [pred_no_trigger, base] = [kinds[2], kinds[3]].map(|kind| random(&preserved, kind));
        let kind = crate::ops::compute_kind(&kinds);
        let weights = [&[0.5f32, 0.0, 2.0] as &[f32], &[1.0, 0.5, 3.0, 0.0, 0.25]];
        let weights = weights.map(|weights| Tensor::f_from_slice(weights).unwrap());
        let mask = |shape: [i64; 4]| random(&shape, kind).f_gt(0.0).unwrap().f_to_kind(kind).unwrap();
        let masks = [[3, 1, 64, 40], [1, 2, 64, 40]].map(|shape| masked.then(|| mask(shape)));
        let (factor, scale) = (0.7, 0.25);
        let loss = CatLoss {
            diffusion: Pair {
                pred: &pred,
                target: &target,
                sample_weight: Some(&weights[0]),
                mask: masks[0].as_ref(),
            },
            preservation: preserve.then_some(Pair {
                pred: &pred_no_trigger,
                target: &base,
                sample_weight: Some(&weights[1]),
                mask: masks[1].as_ref(),
            }),
            cat_factor: Factor::Number(factor),
            scale: Factor::Number(scale),
            mask_normalize,
            stream: 0,
        };
        let empty =
            |like: &Tensor| Tensor::f_full(like.size(), f64::NAN, (like.f_kind().unwrap(), Device::Cpu)).unwrap();
        let (mut first, mut second) = (empty(&pred), empty(&pred_no_trigger));
        let expected = cat_loss_into(&loss, [Some(&mut first), preserve.then_some(&mut second)]).unwrap();
        let LossValues::Cpu(expected) = expected else { panic!("tensors on the CPU") };

        fake::with_stream(OP, |stream| {
            let grads = [empty(&pred), empty(&pred_no_trigger)];
            let weights = weights.each_ref().map(|weights| weights.f_to_kind(kind).unwrap());
            let rows = [64 * 40, 2 * 64 * 40];
            let term = |index: usize, pred, target| Term {
                pred,
                target,
                grad: Some(&grads[index]),
                weights: Some(&weights[index]),
                mask: masks[index].as_ref().map(|mask| (mask, rows[index])),
            };
            let mut terms = vec![term(0, &pred, &target)];
            if preserve {
                terms.push(term(1, &pred_no_trigger, &base));
            }
            let problem = Problem {
                terms,
                on: Device::Cpu,
                kind,
                per_sample: 2 * 64 * 40,
                mask_normalize,
                cat_factor: Scalar::host(factor),
                scale: Scalar::host(scale),
            };
            let values = cat_loss(stream, &problem).unwrap();
            let close =
                |ours: f64, theirs: f64| assert!((ours - theirs).abs() <= 1e-6 * theirs.abs(), "{ours} {theirs}");
            close(values.total.f_double_value(&[]).unwrap(), expected.total);
            close(values.parts.f_double_value(&[0]).unwrap(), expected.diffusion);
            close(values.parts.f_double_value(&[1]).unwrap(), expected.cat);
            for (ours, theirs) in grads.iter().zip([&first, &second]).take(if preserve { 2 } else { 1 }) {
                // Both round the same float32 numbers, which may differ in their last bit.
                assert!(ours.f_allclose(theirs, 8e-3, 1e-8, false).unwrap());
                assert!(theirs.f_abs().unwrap().f_max().unwrap().f_double_value(&[]).unwrap() > 0.0);
            }
        });
    }

    #[test]
    fn launches_equal_the_cpus_kernel() {
        check([Kind::Float; 4], false, false, true);
        check([Kind::Float; 4], true, false, true);
        check([Kind::BFloat16; 4], true, true, true);
        check([Kind::Half; 4], false, false, false);
        check([Kind::Double; 4], false, false, true);
    }

    #[test]
    fn terms_of_unequal_dtypes_are_launched_apart() {
        check([Kind::BFloat16, Kind::Float, Kind::Float, Kind::Half], true, true, true);
    }

    #[test]
    fn gradients_are_scaled_by_a_factor_of_the_device() {
        fake::with_stream(OP, |stream| {
            let before = [random(&[1001], Kind::BFloat16), random(&[1001], Kind::BFloat16)];
            let grads = [before[0].copy(), before[1].copy()];
            let factor = Tensor::f_from_slice(&[0.5f32]).unwrap();
            let scalar = Scalar::device(address(OP, &factor).unwrap(), false);
            scale_gradients(stream, &[Some(&grads[0]), Some(&grads[1])], Kind::BFloat16, scalar).unwrap();
            scale_gradients(stream, &[Some(&grads[1])], Kind::BFloat16, scalar).unwrap();
            assert_eq!(grads[0], before[0].f_mul_scalar(0.5).unwrap());
            assert_eq!(grads[1], before[1].f_mul_scalar(0.25).unwrap());
        });
    }
}
