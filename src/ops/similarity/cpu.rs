//! CPU kernels of the Knowledge Preservation Score: similarities in one pass.

use crate::cpu::interrupt::is_interrupted;
use crate::cpu::{filled, for_each_task, vectorized, DisjointMut, ElementKind, Elements, Real};
use crate::error::{CatError, Result};

/// Elements a task reads of `a`.
const TASK: usize = 64 * 1024;
/// Elements converted at a time.
const BLOCK: usize = 512;
const LANES: usize = 16;
/// Rows of `b` compared with a row of `a` before the next one: they stay in the second-level cache.
const TILE_ROWS: usize = 64;
const MIN_PARALLEL: usize = 64 * 1024;

/// A matrix, wherever its elements lie: embeddings can be larger than the memory that a copy would need.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The argument that they are.
    pub argument: &'static str,
    /// The memory from the first to the last element.
    pub elements: Elements<'a>,
    /// Rows.
    pub count: usize,
    /// Elements a row.
    pub dim: usize,
    /// Elements from a row to the next, and from a column to the next.
    pub strides: (usize, usize),
}

impl Rows<'_> {
    /// `len` elements of a row from column `start`, borrowed where they are consecutive and of type `T`.
    #[inline(always)]
    fn load<'s, T: Real>(&'s self, row: usize, start: usize, len: usize, scratch: &'s mut [T]) -> &'s [T] {
        let (row_stride, stride) = self.strides;
        let first = row * row_stride + start * stride;
        if stride == 1 {
            return self.elements.load(first, len, scratch);
        }
        let scratch = &mut scratch[..len];
        self.elements.gather(first, stride, scratch);
        scratch
    }
}

/// Runs `row(i)` for every row of `rows` and collects what it returns; `row` is `#[inline(always)]`.
fn map_rows(op: &'static str, threads: usize, rows: Rows, row: impl Fn(usize) -> f64 + Sync) -> Result<Vec<f64>> {
    let count = rows.count;
    let per_task = (TASK / rows.dim).max(1);
    let threads = if rows.count * rows.dim < MIN_PARALLEL { 1 } else { threads };
    let mut values = filled(op, rows.argument, count, 0.0f64)?;
    let slots = DisjointMut::new(&mut values);
    for_each_task(op, threads, count.div_ceil(per_task), |task| {
        let start = task * per_task;
        let len = per_task.min(count - start);
        // SAFETY: every task writes its own rows.
        let slots = unsafe { slots.range(start, len) };
        vectorized!({
            for (slot, index) in slots.iter_mut().zip(start..) {
                *slot = row(index);
            }
        });
    })?;
    Ok(values)
}

/// s(a_i, b_i) = (1 + cos) / 2 for every i; NaN where a row is zero or not finite.
pub fn paired<T: Real>(op: &'static str, threads: usize, a: Rows, b: Rows) -> Result<Vec<f64>> {
    map_rows(
        op,
        threads,
        a,
        #[inline(always)]
        |index| {
            let [aa, bb, ab] = products::<T>(a, index, b, index);
            score(ab, in_range::<T>(aa) * in_range::<T>(bb))
        },
    )
}

/// The mean over j of s(a_i, b_j): by linearity, against the mean of b's normalized rows.
pub fn cross_mean<T: Real>(op: &'static str, threads: usize, a: Rows, b: Rows) -> Result<Vec<f64>> {
    let norms = norms::<T>(op, threads, b)?;
    let mut mean = filled(op, b.argument, b.dim, 0.0f64)?;
    let mut scratch = filled(op, b.argument, b.dim, T::ZERO)?;
    for (row, norm) in norms.iter().enumerate() {
        if is_interrupted() {
            return Err(CatError::Interrupted { op });
        }
        let values = b.load(row, 0, b.dim, &mut scratch);
        let weight = 1.0 / (norm * b.count as f64);
        for (mean, value) in mean.iter_mut().zip(values) {
            *mean += weight * value.to_f64();
        }
    }
    let mean: Vec<T> = mean.into_iter().map(T::from_f64).collect();
    map_rows(
        op,
        threads,
        a,
        #[inline(always)]
        |index| {
            let mut scratch = [T::ZERO; BLOCK];
            let (mut aa, mut am) = (0.0, 0.0);
            for start in (0..a.dim).step_by(BLOCK) {
                let len = BLOCK.min(a.dim - start);
                let block = a.load::<T>(index, start, len, &mut scratch);
                aa += dot(block, block);
                am += dot(block, &mean[start..start + len]);
            }
            score(am, in_range::<T>(aa))
        },
    )
}

/// The maximum over j of s(a_i, b_j).
pub fn cross_max<T: Real>(op: &'static str, threads: usize, a: Rows, b: Rows) -> Result<Vec<f64>> {
    let norms = norms::<T>(op, threads, b)?;
    let own = self::norms::<T>(op, threads, a)?;
    let best = filled(op, a.argument, a.count, f64::NEG_INFINITY)?;
    let tiles = b.count.div_ceil(TILE_ROWS);
    (0..tiles).try_fold(best, |best, tile| {
        let rows = tile * TILE_ROWS..b.count.min((tile + 1) * TILE_ROWS);
        map_rows(
            op,
            threads,
            a,
            #[inline(always)]
            |index| {
                rows.clone().fold(best[index], |best, row| {
                    let [_, _, ab] = products::<T>(a, index, b, row);
                    let value = score(ab, (own[index] * norms[row]).powi(2));
                    // f64::max would hide a NaN, which the caller reports.
                    if value > best || value.is_nan() {
                        value
                    } else {
                        best
                    }
                })
            },
        )
    })
}

/// The norms of the rows; NaN where one has no direction, or its square leaves the range of `T`.
pub fn norms<T: Real>(op: &'static str, threads: usize, rows: Rows) -> Result<Vec<f64>> {
    map_rows(
        op,
        threads,
        rows,
        #[inline(always)]
        |index| in_range::<T>(products::<T>(rows, index, rows, index)[0]).sqrt(),
    )
}

/// A sum of squares; NaN where it may have lost digits to the range of `T`, or a row has no direction.
#[inline(always)]
fn in_range<T: Real>(square: f64) -> f64 {
    let least = if T::KIND == ElementKind::F32 { 1e-30 } else { 0.0 };
    if square > least && square.is_finite() {
        square
    } else {
        f64::NAN
    }
}

/// (1 + cos) / 2 from a.b and |a|^2 |b|^2; rounding can leave [0, 1] by a hair.
#[inline(always)]
fn score(product: f64, squared_norms: f64) -> f64 {
    let cosine = product / squared_norms.sqrt();
    if cosine.is_finite() {
        (0.5 + 0.5 * cosine).clamp(0.0, 1.0)
    } else {
        f64::NAN
    }
}

/// [a.a, b.b, a.b] of two rows.
#[inline(always)]
fn products<T: Real>(a: Rows, a_index: usize, b: Rows, b_index: usize) -> [f64; 3] {
    let mut a_scratch = [T::ZERO; BLOCK];
    let mut b_scratch = [T::ZERO; BLOCK];
    let mut totals = [0.0; 3];
    for start in (0..a.dim).step_by(BLOCK) {
        let len = BLOCK.min(a.dim - start);
        let a_block = a.load::<T>(a_index, start, len, &mut a_scratch);
        let b_block = b.load::<T>(b_index, start, len, &mut b_scratch);
        for (total, part) in totals.iter_mut().zip(three_dots(a_block, b_block)) {
            *total += part;
        }
    }
    totals
}

#[inline(always)]
fn three_dots<T: Real>(a: &[T], b: &[T]) -> [f64; 3] {
    let mut lanes = [[T::ZERO; LANES]; 3];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_tail, b_tail) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[0][lane] = lanes[0][lane] + a[lane] * a[lane];
            lanes[1][lane] = lanes[1][lane] + b[lane] * b[lane];
            lanes[2][lane] = lanes[2][lane] + a[lane] * b[lane];
        }
    }
    let mut sums = lanes.map(|lanes| lanes.iter().map(|lane| lane.to_f64()).sum::<f64>());
    for (a, b) in a_tail.iter().zip(b_tail) {
        let (a, b) = (a.to_f64(), b.to_f64());
        sums[0] += a * a;
        sums[1] += b * b;
        sums[2] += a * b;
    }
    sums
}

#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> f64 {
    let mut lanes = [T::ZERO; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_tail, b_tail) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = lanes[lane] + a[lane] * b[lane];
        }
    }
    let tail: f64 = a_tail.iter().zip(b_tail).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
    tail + lanes.iter().map(|lane| lane.to_f64()).sum::<f64>()
}
