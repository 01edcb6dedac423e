//! CPU kernel of the CAT loss: one pass that reads every prediction and target once and writes the gradients.

use crate::cpu::{for_each_task, vectorized, DisjointMut, Elements, ElementsMut, Real};
use crate::error::Result;

/// Elements a task handles: enough to hide its start, few enough to balance.
const TASK: usize = 16 * 1024;
/// Elements a block holds: its scratch stays in the first-level cache.
const BLOCK: usize = 1024;
/// Independent partial sums: fixes the order of additions and fills the SIMD lanes.
const LANES: usize = 32;
/// Below this many elements a second thread costs more than it saves.
const MIN_PARALLEL: usize = 48 * 1024;

/// One squared-error term, mean_i w_i * mean_x m * (pred - target)^2.
#[derive(Debug)]
pub struct Term<'a> {
    /// The prediction.
    pub pred: Elements<'a>,
    /// What it is compared with.
    pub target: Elements<'a>,
    /// Where the gradient with respect to `pred` goes, if wanted.
    pub grad: Option<ElementsMut<'a>>,
    /// The gradient's factor, d(loss)/d(term).
    pub factor: f64,
    /// Samples.
    pub batch: usize,
    /// Per-sample weights.
    pub weights: Option<Vec<f64>>,
    /// The mask.
    pub mask: Option<Mask<'a>>,
}

/// A mask that repeats over each sample's channels.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// One row of `period` elements, or one a sample.
    pub elements: Elements<'a>,
    /// Elements a row; it divides the elements of a sample.
    pub period: usize,
    /// Whether every sample has its own row.
    pub per_sample: bool,
}

/// Everything of the loss but the dtype it is computed in.
#[derive(Debug)]
pub struct Problem<'a> {
    /// The terms.
    pub terms: Vec<Term<'a>>,
    /// Elements a sample.
    pub per_sample: usize,
    /// Whether the mean is over the mask's weight instead of over all elements.
    pub mask_normalize: bool,
}

/// The terms' values, in f64; writes the gradients that are wanted.
pub fn cat_loss<T: Real>(op: &'static str, threads: usize, problem: &Problem) -> Result<Vec<f64>> {
    let Problem { terms, per_sample, .. } = problem;
    // Of the samples of all terms, one term after the other.
    let scales: Vec<f64> = terms.iter().flat_map(|term| sample_scales::<T>(term, problem)).collect();
    let tasks_per_sample = per_sample.div_ceil(TASK);
    let tasks = scales.len() * tasks_per_sample;
    let threads = if scales.len() * per_sample < MIN_PARALLEL { 1 } else { threads };
    let first = terms[0].batch;

    let mut sums = vec![0.0f64; tasks];
    let slots = DisjointMut::new(&mut sums);
    for_each_task(op, threads, tasks, |task| {
        let (row, part) = (task / tasks_per_sample, task % tasks_per_sample);
        let (term, sample) = if row < first { (&terms[0], row) } else { (&terms[1], row - first) };
        let start = part * TASK;
        let len = TASK.min(per_sample - start);
        let sum = vectorized!(task_sum::<T>(term, sample, *per_sample, start, len, scales[row]));
        // SAFETY: every task writes its own slot.
        let slot = unsafe { slots.range(task, 1) };
        slot[0] = sum;
    })?;

    let mut samples = sums.chunks(tasks_per_sample).zip(&scales);
    let value = |term: &Term| -> f64 {
        samples.by_ref().take(term.batch).map(|(parts, scale)| scale * parts.iter().sum::<f64>()).sum()
    };
    Ok(terms.iter().map(value).collect())
}

/// w_i / (B * denominator_i): what turns a sample's sum of squares into its share of the term.
fn sample_scales<T: Real>(term: &Term, problem: &Problem) -> Vec<f64> {
    (0..term.batch)
        .map(|sample| {
            let weight = term.weights.as_ref().map_or(1.0, |weights| weights[sample]);
            let denominator = match term.mask {
                Some(mask) if problem.mask_normalize => {
                    let repeats = (problem.per_sample / mask.period) as f64;
                    repeats * mask_row_sum::<T>(mask, sample)
                }
                _ => problem.per_sample as f64,
            };
            // A sample that is masked out whole has nothing to learn from: it counts as zero.
            if denominator == 0.0 {
                0.0
            } else {
                weight / (term.batch as f64 * denominator)
            }
        })
        .collect()
}

fn mask_row_sum<T: Real>(mask: Mask, sample: usize) -> f64 {
    let mut scratch = [T::ZERO; BLOCK];
    let row = mask_row_start(mask, sample);
    (0..mask.period)
        .step_by(BLOCK)
        .map(|start| {
            let len = BLOCK.min(mask.period - start);
            mask.elements.load(row + start, len, &mut scratch).iter().map(|value| value.to_f64()).sum::<f64>()
        })
        .sum()
}

#[inline(always)]
fn mask_row_start(mask: Mask, sample: usize) -> usize {
    if mask.per_sample {
        sample * mask.period
    } else {
        0
    }
}

/// The sum of m * (pred - target)^2 over a task's elements of one sample; writes their gradients.
#[inline(always)]
fn task_sum<T: Real>(term: &Term, sample: usize, per_sample: usize, start: usize, len: usize, scale: f64) -> f64 {
    let gradient_scale = T::from_f64(2.0 * term.factor * scale);
    let mut pred_scratch = [T::ZERO; BLOCK];
    let mut target_scratch = [T::ZERO; BLOCK];
    let mut mask_scratch = [T::ZERO; BLOCK];
    let mut grad_scratch = [T::ZERO; BLOCK];
    let mut sums = [0.0; LANES];
    let mut at = start;
    while at < start + len {
        let mut size = BLOCK.min(start + len - at);
        if let Some(mask) = term.mask {
            size = size.min(mask.period - at % mask.period);
        }
        let offset = sample * per_sample + at;
        let pred = term.pred.load(offset, size, &mut pred_scratch);
        let target = term.target.load(offset, size, &mut target_scratch);
        let mask = term
            .mask
            .map(|mask| mask.elements.load(mask_row_start(mask, sample) + at % mask.period, size, &mut mask_scratch));
        match &term.grad {
            Some(grad) => {
                // SAFETY: tasks cover disjoint ranges, and this one holds a single block at a time.
                let block = unsafe { grad.block(offset, size) };
                block.fill(
                    size,
                    &mut grad_scratch,
                    #[inline(always)]
                    |grad| add_block(pred, target, mask, grad, gradient_scale, &mut sums),
                );
            }
            None => add_block(pred, target, mask, &mut grad_scratch[..size], gradient_scale, &mut sums),
        }
        at += size;
    }
    sums.iter().sum()
}

/// Adds m * (pred - target)^2 of a block to the [`LANES`] interleaved sums, and writes the gradient.
///
/// A gradient that nobody asked for goes to memory that stays in the first-level cache, where it costs nothing.
#[inline(always)]
fn add_block<T: Real>(
    pred: &[T],
    target: &[T],
    mask: Option<&[T]>,
    grad: &mut [T],
    scale: T,
    sums: &mut [f64; LANES],
) {
    match mask {
        Some(mask) => add_rows(pred, target, mask, grad, sums, scale, |mask, error| mask * error),
        // The closure ignores the third slice, which only has to be as long.
        None => add_rows(pred, target, pred, grad, sums, scale, |_, error| error),
    }
}

#[inline(always)]
fn add_rows<T: Real>(
    pred: &[T],
    target: &[T],
    mask: &[T],
    grad: &mut [T],
    sums: &mut [f64; LANES],
    scale: T,
    apply: impl Fn(T, T) -> T,
) {
    let (pred, pred_tail) = pred.as_chunks::<LANES>();
    let (target, target_tail) = target.as_chunks::<LANES>();
    let (mask, mask_tail) = mask.as_chunks::<LANES>();
    let (grad, grad_tail) = grad.as_chunks_mut::<LANES>();
    let mut lanes = [T::ZERO; LANES];
    for (((pred, target), mask), grad) in pred.iter().zip(target).zip(mask).zip(grad) {
        for lane in 0..LANES {
            let error = pred[lane] - target[lane];
            let masked = apply(mask[lane], error);
            grad[lane] = scale * masked;
            lanes[lane] = lanes[lane] + masked * error;
        }
    }
    let tail = pred_tail.iter().zip(target_tail).zip(mask_tail).zip(grad_tail).zip(&mut lanes);
    for ((((&pred, &target), &mask), grad), lane) in tail {
        let error = pred - target;
        let masked = apply(mask, error);
        *grad = scale * masked;
        *lane = *lane + masked * error;
    }
    for (sum, lane) in sums.iter_mut().zip(lanes) {
        *sum += lane.to_f64();
    }
}
