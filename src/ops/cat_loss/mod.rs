//! The CAT loss, its two terms and the gradients of both predictions (arXiv 2404.07554).
//!
//! L = mean_i w_i mean_x m (f(c) - y)^2 + cat_factor * mean_i w_i mean_x m (f(c0) - f_base(c0))^2

mod cpu;

use tch::{Device, Kind, Tensor};

use self::cpu::{Mask, Problem, Term};
use super::{compute_kind, threads};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{check_constant, check_dense_cpu, check_float, check_shape, contiguous, elements, elements_mut};

const OP: &str = "cat_loss";

/// A prediction and what it is compared with.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'t> {
    /// The prediction, [B, ...].
    pub pred: &'t Tensor,
    /// The constant it is compared with, of the same shape.
    pub target: &'t Tensor,
}

/// The arguments of the loss.
#[derive(Clone, Copy, Debug)]
pub struct CatLoss<'t> {
    /// f(z_t, t, c) and the diffusion target y.
    pub diffusion: Pair<'t>,
    /// f(z_t, t, c0) and f_base(z_t, t, c0); `None` is the plain diffusion loss.
    pub preservation: Option<Pair<'t>>,
    /// The weight of the preservation term.
    pub cat_factor: f64,
    /// w_i, [B].
    pub sample_weight: Option<&'t Tensor>,
    /// m, of the predictions' shape up to size-1 dimensions.
    pub mask: Option<&'t Tensor>,
    /// Divide by the mask's sum instead of by the number of elements.
    pub mask_normalize: bool,
}

/// The values of the loss, before rounding to `kind`.
#[derive(Clone, Copy, Debug)]
pub struct Values {
    /// diffusion + cat_factor * cat
    pub total: f64,
    /// The diffusion term.
    pub diffusion: f64,
    /// The preservation term, without its factor.
    pub cat: f64,
    /// float32, or float64 where an input is float64.
    pub kind: Kind,
}

/// Below this length the kernel's blocks would be too short to vectorize: such a mask is written out.
const SHORTEST_ROW: i64 = 256;

impl Values {
    /// The total, a 0-dim tensor.
    pub fn total(&self) -> Result<Tensor> {
        Tensor::f_full(&[] as &[i64], self.total, (self.kind, Device::Cpu)).during(OP)
    }

    /// [diffusion, cat]
    pub fn parts(&self) -> Result<Tensor> {
        Tensor::f_from_slice(&[self.diffusion, self.cat]).during(OP)?.f_to_kind(self.kind).during(OP)
    }
}

const NAMES: [[&str; 2]; 2] = [["model_pred", "target"], ["model_pred_no_trigger", "base_pred"]];

impl CatLoss<'_> {
    fn pairs(&self) -> impl Iterator<Item = (Pair<'_>, [&'static str; 2])> {
        std::iter::once(self.diffusion).chain(self.preservation).zip(NAMES)
    }

    /// Checks every argument and returns the dtype to compute in.
    fn check(&self) -> Result<Kind> {
        let mut kinds = Vec::with_capacity(4);
        for (pair, [pred_name, target_name]) in self.pairs() {
            kinds.push(check_float(OP, pred_name, pair.pred)?);
            kinds.push(check_float(OP, target_name, pair.target)?);
        }
        let shape = self.diffusion.pred.size();
        for (pair, [pred_name, target_name]) in self.pairs() {
            check_shape(OP, pred_name, pair.pred, &shape)?;
            check_shape(OP, target_name, pair.target, &shape)?;
            check_constant(OP, target_name, pair.target)?;
        }
        if shape.is_empty() || shape.contains(&0) {
            return Err(CatError::shape(OP, "model_pred", "[B, ...] with no empty dimension", &shape));
        }
        if !(self.cat_factor >= 0.0 && self.cat_factor.is_finite()) {
            return Err(CatError::value(OP, "cat_factor", "a finite number >= 0", self.cat_factor));
        }
        Ok(compute_kind(&kinds))
    }
}

/// The values of the loss; writes `scale` times the gradients of the predictions where a place is given.
///
/// `grads[0]` belongs to the prediction with the trigger, `grads[1]` to the one without; each is a contiguous
/// tensor of its prediction's shape, in any float dtype. Sums accumulate in f32 lanes and f64 totals (f64
/// throughout for f64 inputs), in an order that does not depend on the number of threads.
pub fn cat_loss_into(loss: &CatLoss, scale: f64, grads: [Option<&mut Tensor>; 2]) -> Result<Values> {
    let kind = loss.check()?;
    evaluate(loss, kind, scale, grads)
}

/// As [`cat_loss_into`], allocating the gradients that `wanted` names, in their predictions' dtypes.
pub fn cat_loss(loss: &CatLoss, scale: f64, wanted: [bool; 2]) -> Result<(Values, [Option<Tensor>; 2])> {
    let kind = loss.check()?;
    let mut grads = allocate_grads(loss, wanted)?;
    let [first, second] = &mut grads;
    let values = evaluate(loss, kind, scale, [first.as_mut(), second.as_mut()])?;
    Ok((values, grads))
}

/// Gradients for the predictions that `wanted` names. Two of one dtype share an allocation: the C library returns
/// memory to the system by the block, and pages that come back cost more than the kernel.
fn allocate_grads(loss: &CatLoss, wanted: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
    let mut shape = loss.diffusion.pred.size();
    let kinds = loss
        .pairs()
        .zip(wanted)
        .map(|((pair, _), wanted)| if wanted { pair.pred.f_kind().map(Some) } else { Ok(None) })
        .collect::<std::result::Result<Vec<_>, _>>()
        .during(OP)?;
    if let [Some(first), Some(second)] = kinds[..] {
        if first == second {
            shape.insert(0, 2);
            let both = Tensor::f_empty(&shape, (first, Device::Cpu)).during(OP)?;
            return Ok([Some(both.f_select(0, 0).during(OP)?), Some(both.f_select(0, 1).during(OP)?)]);
        }
    }
    let mut grads = [None, None];
    for (grad, kind) in grads.iter_mut().zip(kinds) {
        *grad = kind.map(|kind| Tensor::f_empty(&shape, (kind, Device::Cpu))).transpose().during(OP)?;
    }
    Ok(grads)
}

fn evaluate(loss: &CatLoss, kind: Kind, scale: f64, grads: [Option<&mut Tensor>; 2]) -> Result<Values> {
    let shape = loss.diffusion.pred.size();
    let batch = shape[0];
    let dense = loss
        .pairs()
        .map(|(pair, _)| Ok((contiguous(OP, pair.pred)?, contiguous(OP, pair.target)?)))
        .collect::<Result<Vec<_>>>()?;
    let mask = loss.mask.map(|mask| expand_mask(mask, &shape, kind)).transpose()?;
    let factors = [1.0, loss.cat_factor];
    let terms = dense
        .iter()
        .zip(grads)
        .zip(factors)
        .map(|(((pred, target), grad), factor)| {
            Ok(Term {
                pred: elements(OP, pred)?,
                target: elements(OP, target)?,
                grad: grad.map(|grad| elements_mut(OP, grad)).transpose()?,
                factor: factor * scale,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let problem = Problem {
        terms,
        batch: batch as usize,
        per_sample: loss.diffusion.pred.numel() / batch as usize,
        weights: loss.sample_weight.map(|weight| check_weights(weight, batch)).transpose()?,
        mask: mask.as_ref().map(|(mask, period)| mask_view(mask, *period)).transpose()?,
        mask_normalize: loss.mask_normalize,
    };
    let values = match kind {
        Kind::Double => cpu::cat_loss::<f64>(OP, threads(), &problem)?,
        _ => cpu::cat_loss::<f32>(OP, threads(), &problem)?,
    };
    let (diffusion, cat) = (values[0], values.get(1).copied().unwrap_or(0.0));
    Ok(Values { total: diffusion + loss.cat_factor * cat, diffusion, cat, kind })
}

/// The weights as f64: finite, >= 0, one a sample.
fn check_weights(weight: &Tensor, batch: i64) -> Result<Vec<f64>> {
    const NAME: &str = "sample_weight";
    check_float(OP, NAME, weight)?;
    check_shape(OP, NAME, weight, &[batch])?;
    check_constant(OP, NAME, weight)?;
    let weight = contiguous(OP, weight)?;
    let mut weights = vec![0.0f64; batch as usize];
    elements(OP, &weight)?.copy_into(&mut weights);
    match weights.iter().position(|weight| !(*weight >= 0.0 && weight.is_finite())) {
        Some(index) => {
            let got = format!("{} at index {index}", weights[index]);
            Err(CatError::value(OP, NAME, "finite and >= 0 everywhere", got))
        }
        None => Ok(weights),
    }
}

/// The mask as contiguous rows in `kind`, and the length of a row: one row, or one a sample.
fn expand_mask(mask: &Tensor, shape: &[i64], kind: Kind) -> Result<(Tensor, usize)> {
    const NAME: &str = "mask";
    check_dense_cpu(OP, NAME, mask)?;
    check_constant(OP, NAME, mask)?;
    if mask.f_kind().during(OP)? != Kind::Bool {
        check_float(OP, NAME, mask)?;
    }
    let got = mask.size();
    let fits = got.len() == shape.len() && got.iter().zip(shape).all(|(got, size)| got == size || *got == 1);
    if !fits {
        return Err(CatError::shape(OP, NAME, format!("{shape:?} up to dimensions of size 1"), &got));
    }
    // A mask that repeats over the leading dimensions only (the usual [B, 1, H, W]) is read in place of a copy.
    let repeated = got.iter().skip(1).zip(&shape[1..]).take_while(|(got, size)| **got == 1 && **size != 1).count();
    let mut rows = shape.to_vec();
    rows[0] = got[0];
    if shape[1 + repeated..].iter().product::<i64>() >= SHORTEST_ROW {
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
