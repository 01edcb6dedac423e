//! CPU kernel of noising: reads latents and noise once, writes the noisy batch (repeated) and the target.

use crate::cpu::{for_each_task, vectorized, Elements, ElementsMut, Real};
use crate::error::Result;

const TASK: usize = 16 * 1024;
const BLOCK: usize = 1024;
const MIN_PARALLEL: usize = 48 * 1024;

/// z = signal * x + noise * n and target = target_x * x + target_n * n, for one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Factor of the latent in z.
    pub signal: f64,
    /// Factor of the noise in z.
    pub noise: f64,
    /// Factor of the latent in the target.
    pub target_signal: f64,
    /// Factor of the noise in the target.
    pub target_noise: f64,
}

/// Everything of the operation but the dtype it is computed in.
#[derive(Debug)]
pub struct Problem<'a> {
    /// x, [B, n].
    pub latents: Elements<'a>,
    /// n, [B, n].
    pub noise: Elements<'a>,
    /// One a sample.
    pub rates: Vec<Rates>,
    /// z, [copies * B, n].
    pub noisy: ElementsMut<'a>,
    /// How often the noisy batch is written.
    pub copies: usize,
    /// The target, [B, n]; `None` where it is the noise itself.
    pub target: Option<ElementsMut<'a>>,
}

/// Writes the noisy batch and the target.
pub fn noising<T: Real>(op: &'static str, threads: usize, problem: &Problem) -> Result<()> {
    let batch = problem.rates.len();
    let per_sample = problem.latents.len() / batch;
    let tasks_per_sample = per_sample.div_ceil(TASK);
    let threads = if problem.noisy.len() < MIN_PARALLEL { 1 } else { threads };
    for_each_task(op, threads, batch * tasks_per_sample, |task| {
        let (sample, part) = (task / tasks_per_sample, task % tasks_per_sample);
        let start = part * TASK;
        let end = per_sample.min(start + TASK);
        vectorized!({
            for at in (start..end).step_by(BLOCK) {
                noise_block::<T>(problem, sample * per_sample + at, BLOCK.min(end - at), problem.rates[sample]);
            }
        });
    })
}

#[inline(always)]
fn noise_block<T: Real>(problem: &Problem, offset: usize, len: usize, rates: Rates) {
    let mut latent_scratch = [T::ZERO; BLOCK];
    let mut noise_scratch = [T::ZERO; BLOCK];
    let mut scratch = [T::ZERO; BLOCK];
    let latents = problem.latents.load(offset, len, &mut latent_scratch);
    let noise = problem.noise.load(offset, len, &mut noise_scratch);
    combine(latents, noise, rates.signal, rates.noise, &mut scratch[..len]);
    for copy in 0..problem.copies {
        // SAFETY: tasks cover disjoint ranges of every copy, and one block is alive at a time.
        unsafe { problem.noisy.block(copy * problem.latents.len() + offset, len) }.store(&scratch[..len]);
    }
    if let Some(target) = &problem.target {
        combine(latents, noise, rates.target_signal, rates.target_noise, &mut scratch[..len]);
        // SAFETY: as above.
        unsafe { target.block(offset, len) }.store(&scratch[..len]);
    }
}

#[inline(always)]
fn combine<T: Real>(x: &[T], n: &[T], x_rate: f64, n_rate: f64, out: &mut [T]) {
    let (x_rate, n_rate) = (T::from_f64(x_rate), T::from_f64(n_rate));
    for ((out, &x), &n) in out.iter_mut().zip(x).zip(n) {
        *out = x_rate * x + n_rate * n;
    }
}
