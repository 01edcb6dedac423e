//! The CAT loss, its two terms and the gradients of both predictions (arXiv 2404.07554).
//!
//! L = mean_i w_i mean_x m (f(c) - y)^2 + cat_factor * mean_j w'_j mean_x m' (f(c0) - f_base(c0))^2

mod cpu;
mod cuda;
mod student;

use tch::{Device, Kind, Tensor};

use self::cpu::{Mask, Problem, Term};
pub use self::cuda::variant;
pub use self::student::StudentLoss;
use super::{compute_kind, threads};
use crate::cuda::{Scalar, Stream};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{
    address, check_constant, check_contiguous, check_dense, check_float, check_shape, contiguous, device_of,
    dtype_name, elements, elements_mut, from_values, numbers,
};

const OP: &str = "cat_loss";

/// One term, mean_i w_i mean_x m (pred - target)^2, over its own samples.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'t> {
    /// The prediction, [B, ...].
    pub pred: &'t Tensor,
    /// The constant it is compared with, of the same shape.
    pub target: &'t Tensor,
    /// w_i, [B].
    pub sample_weight: Option<&'t Tensor>,
    /// m, of the prediction's shape up to size-1 dimensions.
    pub mask: Option<&'t Tensor>,
}

/// A number of the host, or one in a tensor: that of a GPU need not be waited for.
#[derive(Clone, Copy, Debug)]
pub enum Factor<'t> {
    /// A number.
    Number(f64),
    /// A tensor of one element, float32 or float64, on the device of the predictions.
    Tensor(&'t Tensor),
}

/// The arguments of the loss: tensors on the CPU or on one GPU.
#[derive(Clone, Copy, Debug)]
pub struct CatLoss<'t> {
    /// f(z_t, t, c) and the diffusion target y.
    pub diffusion: Pair<'t>,
    /// f(z_t, t, c0) and f_base(z_t, t, c0), of as many samples as there are; `None` is the plain diffusion loss.
    pub preservation: Option<Pair<'t>>,
    /// The weight of the preservation term.
    pub cat_factor: Factor<'t>,
    /// The gradients' factor.
    pub scale: Factor<'t>,
    /// Divide by the mask's sum instead of by the number of elements.
    pub mask_normalize: bool,
    /// The raw handle of the GPU's stream.
    pub stream: u64,
}

/// The values of the loss.
#[derive(Debug)]
pub enum LossValues {
    /// Known to the host.
    Cpu(CpuValues),
    /// Known to the GPU once it gets there.
    Gpu(GpuValues),
}

/// The values of the loss, before rounding to `kind`.
#[derive(Clone, Copy, Debug)]
pub struct CpuValues {
    /// diffusion + cat_factor * cat
    pub total: f64,
    /// The diffusion term.
    pub diffusion: f64,
    /// The preservation term, without its factor.
    pub cat: f64,
    /// float32, or float64 where an input is float64.
    pub kind: Kind,
}

/// The values of the loss, on the GPU.
#[derive(Debug)]
pub struct GpuValues {
    /// diffusion + cat_factor * cat, 0-dim.
    pub total: Tensor,
    /// [diffusion, cat]
    pub parts: Tensor,
}

/// Below this length the CPU kernel's blocks would be too short to vectorize: such a mask is written out.
const SHORTEST_ROW: i64 = 256;
/// The same for the blocks of a GPU.
const SHORTEST_GPU_ROW: i64 = 2048;

impl LossValues {
    /// The total, a 0-dim tensor.
    pub fn total(&self) -> Result<Tensor> {
        match self {
            Self::Cpu(CpuValues { total, kind, .. }) => {
                // Rounded here: libtorch refuses a number beyond float32, which is infinite there.
                let total = if *kind == Kind::Float { f64::from(*total as f32) } else { *total };
                Tensor::f_full(&[] as &[i64], total, (*kind, Device::Cpu)).during(OP)
            }
            Self::Gpu(values) => Ok(values.total.shallow_clone()),
        }
    }

    /// [diffusion, cat]
    pub fn parts(&self) -> Result<Tensor> {
        match self {
            Self::Cpu(CpuValues { diffusion, cat, kind, .. }) => {
                from_values(OP, &[*diffusion, *cat])?.f_to_kind(*kind).during(OP)
            }
            Self::Gpu(values) => Ok(values.parts.shallow_clone()),
        }
    }
}

impl Factor<'_> {
    /// Its number, for tensors on the CPU.
    fn number(self, argument: &'static str) -> Result<f64> {
        match self {
            Self::Number(number) => Ok(number),
            Self::Tensor(tensor) => {
                check_factor(argument, tensor, Device::Cpu)?;
                Ok(numbers(OP, tensor)?[0])
            }
        }
    }

    /// What a kernel on the GPU `on` takes.
    fn scalar(self, argument: &'static str, on: Device) -> Result<Scalar> {
        match self {
            Self::Number(number) => Ok(Scalar::host(number)),
            Self::Tensor(tensor) => {
                let kind = check_factor(argument, tensor, on)?;
                Ok(Scalar::device(address(OP, tensor)?, kind == Kind::Double))
            }
        }
    }
}

fn check_factor(argument: &'static str, tensor: &Tensor, on: Device) -> Result<Kind> {
    let kind = check_float(OP, argument, tensor, on)?;
    if !matches!(kind, Kind::Float | Kind::Double) || tensor.numel() != 1 {
        let got = format!("{} of shape {:?}", dtype_name(kind), tensor.size());
        return Err(CatError::value(OP, argument, "one float32 or float64 element", got));
    }
    Ok(kind)
}

/// What the arguments of a term are called.
#[derive(Clone, Copy, Debug)]
struct Names {
    pred: &'static str,
    target: &'static str,
    weight: &'static str,
    mask: &'static str,
}

const NAMES: [Names; 2] = [
    Names { pred: "model_pred", target: "target", weight: "sample_weight", mask: "mask" },
    Names { pred: "model_pred_no_trigger", target: "base_pred", weight: "preserve_weight", mask: "preserve_mask" },
];

impl<'t> CatLoss<'t> {
    fn pairs(&self) -> impl Iterator<Item = (Pair<'t>, Names)> {
        std::iter::once(self.diffusion).chain(self.preservation).zip(NAMES)
    }

    /// Checks predictions, targets and factors; returns the device and the dtype to compute in.
    fn check(&self) -> Result<(Device, Kind)> {
        let on = device_of(OP, NAMES[0].pred, self.diffusion.pred)?;
        let mut kinds = Vec::with_capacity(4);
        for (pair, names) in self.pairs() {
            kinds.push(check_float(OP, names.pred, pair.pred, on)?);
            kinds.push(check_float(OP, names.target, pair.target, on)?);
        }
        let first = self.diffusion.pred.size();
        if first.is_empty() || first.contains(&0) {
            return Err(CatError::shape(OP, NAMES[0].pred, "[B, ...] with no empty dimension", &first));
        }
        for (pair, names) in self.pairs() {
            let shape = pair.pred.size();
            if shape.get(1..) != Some(&first[1..]) || shape[0] == 0 {
                let expected = format!("[P >= 1{}]", first[1..].iter().map(|n| format!(", {n}")).collect::<String>());
                return Err(CatError::shape(OP, names.pred, expected, &shape));
            }
            check_shape(OP, names.target, pair.target, &shape)?;
            check_constant(OP, names.target, pair.target)?;
        }
        if on == Device::Cpu || matches!(self.cat_factor, Factor::Number(_)) {
            let factor = self.cat_factor.number("cat_factor")?;
            if !(factor >= 0.0 && factor.is_finite()) {
                return Err(CatError::value(OP, "cat_factor", "a finite number >= 0", factor));
            }
        }
        Ok((on, compute_kind(&kinds)))
    }
}

/// The values of the loss; writes the gradients of the predictions where a place is given.
///
/// `grads[0]` belongs to the prediction with the trigger, `grads[1]` to the one without; each is a contiguous
/// tensor of its prediction's shape, on the CPU in any float dtype, else in the prediction's. Sums accumulate in f32
/// lanes and f64 totals (f64 throughout for f64 inputs), in an order that does not depend on the number of threads.
pub fn cat_loss_into(loss: &CatLoss, grads: [Option<&mut Tensor>; 2]) -> Result<LossValues> {
    let (on, kind) = loss.check()?;
    evaluate(loss, on, kind, grads)
}

/// As [`cat_loss_into`], allocating the gradients that `wanted` names, in their predictions' dtypes.
pub fn cat_loss(loss: &CatLoss, wanted: [bool; 2]) -> Result<(LossValues, [Option<Tensor>; 2])> {
    let (on, kind) = loss.check()?;
    let mut grads = allocate_grads(loss, on, wanted)?;
    let [first, second] = &mut grads;
    let values = evaluate(loss, on, kind, [first.as_mut(), second.as_mut()])?;
    Ok((values, grads))
}

/// Multiplies gradients by a factor on their device, in place; on a GPU a factor of 1 costs nothing.
pub fn scale_gradients(mut grads: [Option<Tensor>; 2], factor: &Tensor, stream: u64) -> Result<()> {
    let on = device_of(OP, "factor", factor)?;
    let check = |argument, grad: Option<&Tensor>| {
        let Some(grad) = grad else { return Ok(None) };
        let kind = check_float(OP, argument, grad, on)?;
        check_contiguous(OP, argument, grad)?;
        Ok(Some(kind))
    };
    let kinds = [check("first", grads[0].as_ref())?, check("second", grads[1].as_ref())?];
    let Device::Cuda(gpu) = on else {
        let factor = Factor::Tensor(factor).number("factor")?;
        return grads.iter_mut().flatten().try_for_each(|grad| grad.f_mul_scalar_(factor).during(OP).map(drop));
    };
    let stream = Stream::new(OP, gpu, stream)?;
    let factor = Factor::Tensor(factor).scalar("factor", on)?;
    match (kinds, grads.each_ref().map(Option::as_ref)) {
        ([Some(first), Some(second)], grads @ [Some(one), Some(other)])
            if first == second && one.numel() == other.numel() =>
        {
            cuda::scale_gradients(&stream, &grads, first, factor)
        }
        (kinds, grads) => kinds.into_iter().zip(grads).try_for_each(|(kind, grad)| match kind {
            Some(kind) => cuda::scale_gradients(&stream, &[grad], kind, factor),
            None => Ok(()),
        }),
    }
}

/// Gradients for the predictions that `wanted` names. Two of one dtype share an allocation: the C library returns
/// memory to the system by the block, and pages that come back cost more than the kernel.
fn allocate_grads(loss: &CatLoss, on: Device, wanted: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
    let shapes: Vec<_> = loss.pairs().map(|(pair, _)| pair.pred.size()).collect();
    let kinds = loss
        .pairs()
        .zip(wanted)
        .map(|((pair, _), wanted)| if wanted { pair.pred.f_kind().map(Some) } else { Ok(None) })
        .collect::<std::result::Result<Vec<_>, _>>()
        .during(OP)?;
    if let [Some(first), Some(second)] = kinds[..] {
        if first == second {
            let (batch, preserved) = (shapes[0][0], shapes[1][0]);
            let mut shape = shapes[0].clone();
            shape[0] += preserved;
            let both = Tensor::f_empty(&shape, (first, on)).during(OP)?;
            let part = |start, len| both.f_narrow(0, start, len).during(OP).map(Some);
            return Ok([part(0, batch)?, part(batch, preserved)?]);
        }
    }
    let mut grads = [None, None];
    for ((grad, kind), shape) in grads.iter_mut().zip(kinds).zip(&shapes) {
        *grad = kind.map(|kind| Tensor::f_empty(shape, (kind, on))).transpose().during(OP)?;
    }
    Ok(grads)
}

/// A term's tensors, contiguous.
#[derive(Debug)]
struct Dense {
    pred: Tensor,
    target: Tensor,
    weights: Option<Tensor>,
    /// Its rows, and the length of a row.
    mask: Option<(Tensor, usize)>,
}

impl Dense {
    fn new(pair: Pair, names: Names, on: Device, kind: Kind, before: Option<(Pair, &Self)>) -> Result<Self> {
        let shape = pair.pred.size();
        // Terms that share a mask share its copy.
        let shared = before.filter(|(other, _)| same_mask(pair, *other)).and_then(|(_, dense)| dense.mask.as_ref());
        let mask = match (pair.mask, shared) {
            (Some(_), Some((rows, period))) => Some((rows.shallow_clone(), *period)),
            (mask, _) => mask.map(|mask| expand_mask(names.mask, mask, &shape, on, kind)).transpose()?,
        };
        Ok(Self {
            pred: contiguous(OP, pair.pred)?,
            target: contiguous(OP, pair.target)?,
            weights: pair.sample_weight.map(|weight| check_weights(names.weight, weight, shape[0], on)).transpose()?,
            mask,
        })
    }
}

/// Whether two terms have one mask over as many samples.
fn same_mask(one: Pair, other: Pair) -> bool {
    match (one.mask, other.mask) {
        (Some(mask), Some(like)) => {
            one.pred.size() == other.pred.size()
                && mask.f_kind().ok() == like.f_kind().ok()
                && mask.f_is_set_to(like).unwrap_or(false)
        }
        _ => false,
    }
}

fn evaluate(loss: &CatLoss, on: Device, kind: Kind, grads: [Option<&mut Tensor>; 2]) -> Result<LossValues> {
    let mut dense: Vec<Dense> = Vec::with_capacity(2);
    for (pair, names) in loss.pairs() {
        let term = Dense::new(pair, names, on, kind, dense.first().map(|first| (loss.diffusion, first)))?;
        dense.push(term);
    }
    let per_sample = dense[0].pred.numel() / dense[0].pred.size()[0] as usize;
    if let Device::Cuda(gpu) = on {
        let stream = Stream::new(OP, gpu, loss.stream)?;
        for term in &mut dense {
            let weights = term.weights.take();
            term.weights = weights.map(|weights| weights.f_to_kind(kind)).transpose().during(OP)?;
        }
        for (term, grad) in dense.iter().zip(&grads) {
            let Some(grad) = grad else { continue };
            let (wanted, got) = (term.pred.f_kind().during(OP)?, check_float(OP, "grad", grad, on)?);
            if got != wanted {
                let expected = "the dtype of its prediction";
                return Err(CatError::Dtype { op: OP, argument: "grad", expected, got: dtype_name(got) });
            }
        }
        let terms = dense.iter().zip(&grads).map(|(term, grad)| cuda::Term {
            pred: &term.pred,
            target: &term.target,
            grad: grad.as_deref(),
            weights: term.weights.as_ref(),
            mask: term.mask.as_ref().map(|(mask, period)| (mask, *period as u64)),
        });
        let problem = cuda::Problem {
            terms: terms.collect(),
            on,
            kind,
            per_sample: per_sample as u64,
            mask_normalize: loss.mask_normalize,
            cat_factor: loss.cat_factor.scalar("cat_factor", on)?,
            scale: loss.scale.scalar("scale", on)?,
        };
        return cuda::cat_loss(&stream, &problem).map(LossValues::Gpu);
    }
    let (cat_factor, scale) = (loss.cat_factor.number("cat_factor")?, loss.scale.number("scale")?);
    let terms = dense
        .iter()
        .zip(grads)
        .zip([1.0, cat_factor])
        .zip(NAMES)
        .map(|(((term, grad), factor), names)| {
            Ok(Term {
                pred: elements(OP, &term.pred)?,
                target: elements(OP, &term.target)?,
                grad: grad.map(|grad| elements_mut(OP, grad)).transpose()?,
                factor: factor * scale,
                batch: term.pred.size()[0] as usize,
                weights: term.weights.as_ref().map(|weights| weights_as_f64(names.weight, weights)).transpose()?,
                mask: term.mask.as_ref().map(|(mask, period)| mask_view(mask, *period)).transpose()?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let problem = Problem { terms, per_sample, mask_normalize: loss.mask_normalize };
    let values = match kind {
        Kind::Double => cpu::cat_loss::<f64>(OP, threads(), &problem)?,
        _ => cpu::cat_loss::<f32>(OP, threads(), &problem)?,
    };
    let (diffusion, cat) = (values[0], values.get(1).copied().unwrap_or(0.0));
    Ok(LossValues::Cpu(CpuValues { total: diffusion + cat_factor * cat, diffusion, cat, kind }))
}

/// The weights, contiguous, one a sample.
fn check_weights(name: &'static str, weight: &Tensor, batch: i64, on: Device) -> Result<Tensor> {
    check_float(OP, name, weight, on)?;
    check_shape(OP, name, weight, &[batch])?;
    check_constant(OP, name, weight)?;
    contiguous(OP, weight)
}

/// The weights, finite and >= 0: on a GPU, to see that would be to wait for them.
fn weights_as_f64(name: &'static str, weight: &Tensor) -> Result<Vec<f64>> {
    let weights = numbers(OP, weight)?;
    match weights.iter().position(|weight| !(*weight >= 0.0 && weight.is_finite())) {
        Some(index) => {
            let got = format!("{} at index {index}", weights[index]);
            Err(CatError::value(OP, name, "finite and >= 0 everywhere", got))
        }
        None => Ok(weights),
    }
}

/// The mask as contiguous rows in `kind`, and the length of a row: one row, or one a sample.
fn expand_mask(name: &'static str, mask: &Tensor, shape: &[i64], on: Device, kind: Kind) -> Result<(Tensor, usize)> {
    check_dense(OP, name, mask, on)?;
    check_constant(OP, name, mask)?;
    if !mask.f_kind().is_ok_and(|kind| kind == Kind::Bool) {
        check_float(OP, name, mask, on)?;
    }
    let got = mask.size();
    let fits = got.len() == shape.len() && got.iter().zip(shape).all(|(got, size)| got == size || *got == 1);
    if !fits {
        return Err(CatError::shape(OP, name, format!("{shape:?} up to dimensions of size 1"), &got));
    }
    // A mask that repeats over the leading dimensions only (the usual [B, 1, H, W]) is read in place of a copy.
    let repeated = got.iter().skip(1).zip(&shape[1..]).take_while(|(got, size)| **got == 1 && **size != 1).count();
    let mut rows = shape.to_vec();
    rows[0] = got[0];
    let shortest = if on == Device::Cpu { SHORTEST_ROW } else { SHORTEST_GPU_ROW };
    if shape[1 + repeated..].iter().product::<i64>() >= shortest {
        rows[1..=repeated].fill(1);
    }
    let period = rows[1..].iter().product::<i64>();
    let mask = mask.f_expand(&rows, false).during(OP)?.f_to_kind(kind).during(OP)?.f_contiguous().during(OP)?;
    Ok((mask, period as usize))
}

fn mask_view(mask: &Tensor, period: usize) -> Result<Mask<'_>> {
    let elements = elements(OP, mask)?;
    let per_sample = elements.len() > period;
    Ok(Mask { elements, period, per_sample })
}
