//! CPU kernel of AdamW: one pass for the gradient norm, one for everything else.

use crate::cpu::{for_each_task, vectorized, DisjointMut, Elements, ElementsMut, Real};
use crate::error::Result;

const TASK: usize = 32 * 1024;
const BLOCK: usize = 512;
const LANES: usize = 16;
const MIN_PARALLEL: usize = 64 * 1024;

/// The scalars of one step, in f64.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Multiplies the gradient before anything else: clipping and unscaling.
    pub grad_scale: f64,
    /// 1 - lr * weight_decay
    pub decay: f64,
    /// beta1
    pub beta1: f64,
    /// beta2
    pub beta2: f64,
    /// lr / (1 - beta1^t)
    pub step_size: f64,
    /// sqrt(1 - beta2^t)
    pub correction2_sqrt: f64,
    /// eps
    pub eps: f64,
}

/// The flat buffers of one step, all of one length.
#[derive(Debug)]
pub struct Buffers<'a, T> {
    /// Weights.
    pub param: DisjointMut<'a, T>,
    /// Gradients, of any dtype; zeroed.
    pub grad: ElementsMut<'a>,
    /// First moments.
    pub exp_avg: DisjointMut<'a, T>,
    /// Second moments.
    pub exp_avg_sq: DisjointMut<'a, T>,
    /// The weights again, rounded to the dtype that the layers compute in.
    pub low_precision: Option<ElementsMut<'a>>,
}

/// The sum of squares of `grad`; its order of additions does not depend on the number of threads.
pub fn sum_of_squares<T: Real>(op: &'static str, threads: usize, grad: Elements) -> Result<f64> {
    let tasks = grad.len().div_ceil(TASK);
    let mut sums = vec![0.0f64; tasks];
    let slots = DisjointMut::new(&mut sums);
    for_each_task(op, limit(threads, grad.len()), tasks, |task| {
        let start = task * TASK;
        let len = TASK.min(grad.len() - start);
        let sum = vectorized!(squares::<T>(grad, start, len));
        // SAFETY: every task writes its own slot.
        let slot = unsafe { slots.range(task, 1) };
        slot[0] = sum;
    })?;
    Ok(sums.iter().sum())
}

#[inline(always)]
fn squares<T: Real>(grad: Elements, start: usize, len: usize) -> f64 {
    let mut scratch = [T::ZERO; BLOCK];
    let mut total = 0.0;
    for at in (start..start + len).step_by(BLOCK) {
        let block = grad.load::<T>(at, BLOCK.min(start + len - at), &mut scratch);
        let mut lanes = [T::ZERO; LANES];
        let chunks = block.chunks_exact(LANES);
        total += chunks.remainder().iter().map(|value| value.to_f64() * value.to_f64()).sum::<f64>();
        for chunk in chunks {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane = *lane + value * value;
            }
        }
        total += lanes.iter().map(|lane| lane.to_f64()).sum::<f64>();
    }
    total
}

/// One AdamW step over the buffers; the gradients are zero afterwards.
pub fn adamw<T: Real>(op: &'static str, threads: usize, buffers: &Buffers<T>, step: Step) -> Result<()> {
    let len = buffers.param.len();
    let tasks = len.div_ceil(TASK);
    for_each_task(op, limit(threads, len), tasks, |task| {
        // The norm's pass ended at the last element: starting there finds the gradients still in the cache.
        let start = (tasks - 1 - task) * TASK;
        let end = len.min(start + TASK);
        vectorized!({
            for at in (start..end).step_by(BLOCK) {
                update_block::<T>(buffers, at, BLOCK.min(end - at), step);
            }
        });
    })
}

fn limit(threads: usize, len: usize) -> usize {
    if len < MIN_PARALLEL {
        1
    } else {
        threads
    }
}

#[inline(always)]
fn update_block<T: Real>(buffers: &Buffers<T>, at: usize, len: usize, step: Step) {
    let mut scratch = [T::ZERO; BLOCK];
    let grad = &mut scratch[..len];
    // SAFETY: tasks cover disjoint ranges, and each buffer has a single block alive in a task.
    let (param, exp_avg, exp_avg_sq) = unsafe {
        buffers.grad.block(at, len).take(grad);
        (buffers.param.range(at, len), buffers.exp_avg.range(at, len), buffers.exp_avg_sq.range(at, len))
    };
    update(param, grad, exp_avg, exp_avg_sq, step);
    if let Some(low_precision) = &buffers.low_precision {
        // SAFETY: as above.
        unsafe { low_precision.block(at, len) }.store(param);
    }
}

#[inline(always)]
fn update<T: Real>(param: &mut [T], grad: &[T], exp_avg: &mut [T], exp_avg_sq: &mut [T], step: Step) {
    let grad_scale = T::from_f64(step.grad_scale);
    let decay = T::from_f64(step.decay);
    let new1 = T::from_f64(1.0 - step.beta1);
    let (beta2, new2) = (T::from_f64(step.beta2), T::from_f64(1.0 - step.beta2));
    let step_size = T::from_f64(step.step_size);
    let correction = T::from_f64(1.0 / step.correction2_sqrt);
    let eps = T::from_f64(step.eps);
    for (((param, &grad), m), v) in param.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq) {
        let grad = grad * grad_scale;
        let m_new = *m + new1 * (grad - *m);
        let v_new = beta2 * *v + new2 * grad * grad;
        *m = m_new;
        *v = v_new;
        *param = *param * decay - step_size * m_new / (v_new.sqrt() * correction + eps);
    }
}
