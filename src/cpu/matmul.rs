//! Sums of float32 matrix products on processors with AVX-512: C = scale sum_i A_i B_i + bias.
//!
//! PyTorch's matrix library runs AVX2 code on AMD processors, half of what those with 512-bit units can do, and takes
//! one product at a time. Here a tile of C stays in registers over all products of a sum, so that a low-rank branch costs
//! no pass over the output of its own.
//!
//! A is read where it lies, one broadcast element at a time. Panels of B, 32 or 16 columns wide, are copied to where
//! they can be read in order, unless few rows of A share the copy.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::marker::PhantomData;

use super::for_each_task;
use crate::error::Result;

/// Lanes of a vector register.
const LANES: usize = 16;
/// The most columns of a panel: two registers.
const WIDE: usize = 2 * LANES;
/// Rows of a tile beside two registers of columns: 28 accumulators of 32 registers.
const TILE_ROWS: usize = 14;
/// Rows of a tile beside one register of columns, a usual rank.
const NARROW_TILE_ROWS: usize = 16;
/// Floats of the panels that are kept in the second-level cache at a time.
const GROUP: usize = 96 * 1024;
/// The longest stretch of the inner dimension before a tile goes back to memory.
const DEPTH: usize = 4096;
/// The same where B is read where it lies: the rows of B that stay in the second-level cache.
const DIRECT_DEPTH: usize = 256;
/// Up to this many rows of A a panel of B is not worth copying.
const DIRECT_ROWS: usize = 2 * NARROW_TILE_ROWS;

/// Calls a method generic in the height of the tile.
macro_rules! by_height {
    ($rows:expr => $self:ident . $name:ident :: <$vectors:literal> $arguments:tt; $($height:literal)+) => {
        match $rows {
            $($height => $self.$name::<$vectors, $height> $arguments,)+
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

/// A matrix in memory: element (i, j) is at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: *const f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    memory: PhantomData<&'a [f32]>,
}

// SAFETY: a shared borrow of plain numbers.
unsafe impl Send for Matrix<'_> {}
// SAFETY: as above.
unsafe impl Sync for Matrix<'_> {}

impl<'a> Matrix<'a> {
    /// Rows one after another in memory.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix of {rows} x {columns}");
        Self { data: data.as_ptr(), rows, columns, row_stride: columns, column_stride: 1, memory: PhantomData }
    }

    /// The same memory with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Rows `from .. from + count`.
    fn rows_of(self, from: usize, count: usize) -> Self {
        // SAFETY: within the matrix, or one past its end where the count is zero.
        Self { data: unsafe { self.data.add(from * self.row_stride) }, rows: count, ..self }
    }

    /// Columns `from .. from + count`.
    fn columns_of(self, from: usize, count: usize) -> Self {
        self.transposed().rows_of(from, count).transposed()
    }
}

/// The result, written by tiles that do not overlap.
#[derive(Clone, Copy, Debug)]
struct Output {
    data: *mut f32,
    row_stride: usize,
    column_stride: usize,
}

// SAFETY: every task writes its own tiles.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Whether `matmul` runs on this processor, faster than PyTorch's matrix library.
pub fn beats_library() -> bool {
    let vendor = __cpuid(0);
    let is_amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD";
    is_amd && is_x86_feature_detected!("avx512f")
}

/// What the sum is added onto.
#[derive(Clone, Copy, Debug)]
pub enum Onto<'a> {
    /// C becomes the sum.
    Nothing,
    /// [n], in every row.
    Bias(&'a [f32]),
    /// What is in C.
    Itself,
}

/// C = scale * sum of A B over `terms`, plus what it is added onto; C [m, n] with rows one after another.
///
/// The order of the sums depends on the shapes alone, not on the number of threads.
///
/// # Panics
///
/// Where the shapes do not fit, or the processor lacks AVX-512.
pub fn matmul(
    op: &'static str,
    threads: usize,
    out: &mut [f32],
    terms: &[(Matrix<'_>, Matrix<'_>)],
    scale: f32,
    onto: Onto<'_>,
) -> Result<()> {
    assert!(is_x86_feature_detected!("avx512f"), "matmul needs AVX-512");
    assert!(!terms.is_empty(), "matmul needs a term");
    let (first, last) = terms[0];
    let (rows, columns) = (first.rows, last.columns);
    assert_eq!(out.len(), rows * columns, "the output of {rows} x {columns}");
    let bias = match onto {
        Onto::Bias(bias) => {
            assert_eq!(bias.len(), columns, "a bias of {columns}");
            Some(Address(bias.as_ptr()))
        }
        Onto::Nothing | Onto::Itself => None,
    };
    let keep = matches!(onto, Onto::Itself);
    for (a, b) in terms {
        assert!(a.columns == b.rows && a.rows == rows && b.columns == columns, "{a:?} times {b:?}");
    }
    let output = Output { data: out.as_mut_ptr(), row_stride: columns, column_stride: 1 };
    // The vectors run along the columns: along the longer side of a narrow result, and along the side that is cheap
    // to bring into panels.
    let narrow = columns < WIDE && columns < rows && first.row_stride == 1;
    let few_rows = rows < columns && last.column_stride != 1;
    let sum = if narrow || few_rows {
        Sum {
            terms: terms.iter().map(|(a, b)| (b.transposed(), a.transposed())).collect(),
            output: Output { row_stride: output.column_stride, column_stride: output.row_stride, ..output },
            scale,
            keep,
            row_bias: bias,
            column_bias: None,
        }
    } else {
        Sum { terms: terms.to_vec(), output, scale, keep, row_bias: None, column_bias: bias }
    };
    sum.run(op, threads)
}

/// An address that threads may share.
#[derive(Clone, Copy)]
struct Address(*const f32);

// SAFETY: read only, alive as long as the call.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

/// A stretch of the inner dimension: columns of A and rows of B.
type Stretch<'a> = (Matrix<'a>, Matrix<'a>);

struct Sum<'a> {
    terms: Vec<Stretch<'a>>,
    output: Output,
    scale: f32,
    /// Whether the sum is added to what is in the output.
    keep: bool,
    row_bias: Option<Address>,
    column_bias: Option<Address>,
}

/// A panel of B as the kernel reads it.
struct Panel {
    first_column: usize,
    columns: usize,
    /// For each stretch, where it begins and how far apart its rows are.
    parts: Vec<(Address, usize)>,
}

thread_local! {
    /// Copied panels. Kept, since fresh memory costs more than the copy.
    static PANELS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Sum<'_> {
    fn run(&self, op: &'static str, threads: usize) -> Result<()> {
        let (rows, columns) = (self.terms[0].0.rows, self.terms[0].1.columns);
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        let (tiles, panels) = (rows.div_ceil(TILE_ROWS), columns.div_ceil(WIDE));
        // Each part of the rows copies the panels again.
        let by_rows = tiles >= 2 * threads && columns <= rows;
        let column_parts = if by_rows { 1 } else { threads.min(panels) };
        let row_parts = threads.div_ceil(column_parts).min(tiles);
        for_each_task(op, threads, row_parts * column_parts, |task| {
            let rows = share(rows, 1, row_parts, task / column_parts);
            let columns = share(columns, WIDE, column_parts, task % column_parts);
            PANELS.with_borrow_mut(|scratch| {
                // SAFETY: `matmul` checked the shapes and the processor; tasks have tiles of their own.
                unsafe { self.part(rows, columns, scratch) };
            });
        })
    }

    /// One block of C.
    #[target_feature(enable = "avx512f")]
    unsafe fn part(&self, rows: (usize, usize), columns: (usize, usize), scratch: &mut Vec<f32>) {
        // Not by the rows of this part: the order of the sums must not depend on the number of threads.
        let direct = self.terms.iter().all(|(a, b)| a.rows <= DIRECT_ROWS && b.column_stride == 1);
        for (index, block) in self.blocks(if direct { DIRECT_DEPTH } else { DEPTH }).iter().enumerate() {
            let depth: usize = block.iter().map(|(a, _)| a.columns).sum();
            let in_group = (GROUP / (WIDE * depth.max(1))).max(1) * WIDE;
            let mut from = columns.0;
            while from < columns.1 {
                let to = (from + in_group).min(columns.1);
                // SAFETY: the caller's.
                let group = unsafe { panels(block, (from, to), direct, scratch) };
                let narrow = group.iter().all(|panel| panel.columns <= LANES);
                let height = if narrow { NARROW_TILE_ROWS } else { TILE_ROWS };
                let tiles = (rows.1 - rows.0).div_ceil(height);
                for tile in 0..tiles {
                    let (first, last) = share(rows.1 - rows.0, 1, tiles, tile);
                    for panel in &group {
                        // SAFETY: the caller's.
                        unsafe { self.tile(block, panel, rows.0 + first, last - first, self.keep || index > 0) };
                    }
                }
                from = to;
            }
        }
    }

    /// The inner dimension in stretches of at most `depth`.
    fn blocks(&self, depth: usize) -> Vec<Vec<Stretch<'_>>> {
        let mut blocks: Vec<Vec<Stretch<'_>>> = vec![Vec::new()];
        let mut room = depth;
        for &(a, b) in &self.terms {
            let mut from = 0;
            while from < a.columns {
                if room == 0 {
                    blocks.push(Vec::new());
                    room = depth;
                }
                let count = room.min(a.columns - from);
                if let Some(block) = blocks.last_mut() {
                    block.push((a.columns_of(from, count), b.rows_of(from, count)));
                }
                room -= count;
                from += count;
            }
        }
        blocks
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn tile(&self, block: &[Stretch<'_>], panel: &Panel, first_row: usize, rows: usize, add: bool) {
        // SAFETY: the caller's.
        unsafe {
            if panel.columns > LANES {
                by_height!(
                    rows => self.tile_of::<2>(block, panel, first_row, add);
                    1 2 3 4 5 6 7 8 9 10 11 12 13 14
                );
            } else {
                by_height!(
                    rows => self.tile_of::<1>(block, panel, first_row, add);
                    1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
                );
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn tile_of<const VECTORS: usize, const ROWS: usize>(
        &self,
        block: &[Stretch<'_>],
        panel: &Panel,
        first_row: usize,
        add: bool,
    ) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        for ((a, _), &(b, b_stride)) in block.iter().zip(&panel.parts) {
            let a_start = a.rows_of(first_row, ROWS);
            // SAFETY: `a` has these rows and `b` as many rows as `a` has columns, each of whole vectors.
            unsafe {
                accumulate::<VECTORS, ROWS>(
                    &mut sums,
                    (a_start.data, a.row_stride, a.column_stride),
                    (b.0, b_stride),
                    a.columns,
                );
            }
        }
        let scale = _mm512_set1_ps(self.scale);
        let mut masks = [0; VECTORS];
        for (vector, lanes) in masks.iter_mut().enumerate() {
            *lanes = mask(panel.columns.saturating_sub(vector * LANES));
        }
        for (index, row) in sums.iter_mut().enumerate() {
            for (vector, sum) in row.iter_mut().enumerate() {
                *sum = _mm512_mul_ps(*sum, scale);
                // SAFETY: the masked lanes lie within the bias.
                unsafe {
                    if let (Some(bias), false) = (self.column_bias, add) {
                        let bias = bias.0.add(panel.first_column + vector * LANES);
                        *sum = _mm512_add_ps(*sum, _mm512_maskz_loadu_ps(masks[vector], bias));
                    }
                    if let (Some(bias), false) = (self.row_bias, add) {
                        *sum = _mm512_add_ps(*sum, _mm512_set1_ps(*bias.0.add(first_row + index)));
                    }
                }
            }
        }
        let Output { data, row_stride, column_stride } = self.output;
        // SAFETY: the tile lies within the output.
        unsafe {
            let target = data.add(first_row * row_stride + panel.first_column * column_stride);
            if column_stride == 1 {
                for (index, row) in sums.iter().enumerate() {
                    for (vector, &sum) in row.iter().enumerate() {
                        let place = target.add(index * row_stride + vector * LANES);
                        let before =
                            if add { _mm512_maskz_loadu_ps(masks[vector], place) } else { _mm512_setzero_ps() };
                        _mm512_mask_storeu_ps(place, masks[vector], _mm512_add_ps(sum, before));
                    }
                }
                return;
            }
            for vector in 0..VECTORS {
                let mut lanes = [_mm512_setzero_ps(); LANES];
                for (lane, row) in lanes.iter_mut().zip(&sums) {
                    *lane = row[vector];
                }
                let columns = transpose(lanes);
                let count = panel.columns.saturating_sub(vector * LANES).min(LANES);
                for (column, &sum) in columns.iter().take(count).enumerate() {
                    let place = target.add((vector * LANES + column) * column_stride);
                    let before = if add { _mm512_maskz_loadu_ps(mask(ROWS), place) } else { _mm512_setzero_ps() };
                    _mm512_mask_storeu_ps(place, mask(ROWS), _mm512_add_ps(sum, before));
                }
            }
        }
    }
}

/// sums += A B over `depth` columns of A and rows of B.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn accumulate<const VECTORS: usize, const ROWS: usize>(
    sums: &mut [[__m512; VECTORS]; ROWS],
    (a, row_stride, column_stride): (*const f32, usize, usize),
    (b, b_stride): (*const f32, usize),
    depth: usize,
) {
    let mut local = *sums;
    let (mut a, mut b) = (a, b);
    for _ in 0..depth {
        // SAFETY: the caller's.
        unsafe {
            let mut vectors = [_mm512_setzero_ps(); VECTORS];
            for (index, vector) in vectors.iter_mut().enumerate() {
                *vector = _mm512_loadu_ps(b.add(index * LANES));
            }
            for (row, sums) in local.iter_mut().enumerate() {
                let element = _mm512_set1_ps(*a.add(row * row_stride));
                for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                    *sum = _mm512_fmadd_ps(element, vector, *sum);
                }
            }
            a = a.add(column_stride);
            b = b.add(b_stride);
        }
    }
    *sums = local;
}

/// The panels of columns `from .. to`, copied unless `direct`; the last one of a ragged matrix always is.
#[target_feature(enable = "avx512f")]
unsafe fn panels(
    block: &[Stretch<'_>],
    (from, to): (usize, usize),
    direct: bool,
    scratch: &mut Vec<f32>,
) -> Vec<Panel> {
    let depth: usize = block.iter().map(|(_, b)| b.rows).sum();
    let needed = (to - from).div_ceil(LANES) * LANES * depth;
    if scratch.len() < needed {
        scratch.resize(needed, 0.0);
    }
    let mut free = scratch.as_mut_ptr();
    let mut group = Vec::with_capacity((to - from).div_ceil(WIDE));
    for first_column in (from..to).step_by(WIDE) {
        let columns = WIDE.min(to - first_column);
        let width = columns.div_ceil(LANES) * LANES;
        let mut parts = Vec::with_capacity(block.len());
        for (_, b) in block {
            let b = b.columns_of(first_column, columns);
            if direct && columns == width {
                parts.push((Address(b.data), b.row_stride));
            } else {
                // SAFETY: `needed` counted this panel.
                unsafe {
                    copy_panel(b, free, width);
                    parts.push((Address(free), width));
                    free = free.add(b.rows * width);
                }
            }
        }
        group.push(Panel { first_column, columns, parts });
    }
    group
}

/// Copies up to 32 columns into rows of `width`, filled with zeros.
#[target_feature(enable = "avx512f")]
unsafe fn copy_panel(b: Matrix<'_>, target: *mut f32, width: usize) {
    for from in (0..width).step_by(LANES) {
        let count = b.columns.saturating_sub(from).min(LANES);
        // SAFETY: masked to the matrix; `target` has room for `b.rows` rows of `width`.
        unsafe {
            let source = b.data.add(from * b.column_stride);
            let target = target.add(from);
            if b.column_stride == 1 {
                for row in 0..b.rows {
                    let values = _mm512_maskz_loadu_ps(mask(count), source.add(row * b.row_stride));
                    _mm512_storeu_ps(target.add(row * width), values);
                }
                continue;
            }
            let whole = if b.row_stride == 1 { b.rows / LANES * LANES } else { 0 };
            for row in (0..whole).step_by(LANES) {
                let mut lanes = [_mm512_setzero_ps(); LANES];
                for (column, lane) in lanes.iter_mut().take(count).enumerate() {
                    *lane = _mm512_loadu_ps(source.add(row + column * b.column_stride));
                }
                for (offset, &values) in transpose(lanes).iter().enumerate() {
                    _mm512_storeu_ps(target.add((row + offset) * width), values);
                }
            }
            for row in whole..b.rows {
                for column in 0..LANES {
                    let value =
                        if column < count { *source.add(row * b.row_stride + column * b.column_stride) } else { 0.0 };
                    *target.add(row * width + column) = value;
                }
            }
        }
    }
}

/// Rows to columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512; LANES]) -> [__m512; LANES] {
    // Pairs of rows, then pairs of pairs, by 32 and 64 bits within the four quarters of each register.
    let mut quarters = rows;
    for index in 0..8 {
        let (even, odd) = (rows[2 * index], rows[2 * index + 1]);
        quarters[2 * index] = _mm512_unpacklo_ps(even, odd);
        quarters[2 * index + 1] = _mm512_unpackhi_ps(even, odd);
    }
    let mut fours = rows;
    for index in 0..4 {
        let low = _mm512_castps_pd(quarters[4 * index]);
        let high = _mm512_castps_pd(quarters[4 * index + 1]);
        let low_next = _mm512_castps_pd(quarters[4 * index + 2]);
        let high_next = _mm512_castps_pd(quarters[4 * index + 3]);
        fours[4 * index] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low_next));
        fours[4 * index + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low_next));
        fours[4 * index + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high_next));
        fours[4 * index + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high_next));
    }
    // Then whole quarters: `fours[4 i + j]` holds columns j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 3.
    let mut columns = rows;
    for offset in 0..4 {
        let (first, second, third, fourth) = (fours[offset], fours[4 + offset], fours[8 + offset], fours[12 + offset]);
        let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(first, second);
        let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(first, second);
        let low_next = _mm512_shuffle_f32x4::<0b01_00_01_00>(third, fourth);
        let high_next = _mm512_shuffle_f32x4::<0b11_10_11_10>(third, fourth);
        columns[offset] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low, low_next);
        columns[4 + offset] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low, low_next);
        columns[8 + offset] = _mm512_shuffle_f32x4::<0b10_00_10_00>(high, high_next);
        columns[12 + offset] = _mm512_shuffle_f32x4::<0b11_01_11_01>(high, high_next);
    }
    columns
}

/// The first `count` lanes.
fn mask(count: usize) -> __mmask16 {
    if count >= LANES {
        !0
    } else {
        (1 << count) - 1
    }
}

/// Part `index` of `count` parts of `0 .. length`, in whole `unit`s but for the end.
fn share(length: usize, unit: usize, count: usize, index: usize) -> (usize, usize) {
    let units = length.div_ceil(unit);
    let start = |index: usize| (units * index / count * unit).min(length);
    (start(index), start(index + 1))
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn at(matrix: Matrix<'_>, row: usize, column: usize) -> f64 {
        f64::from(unsafe { *matrix.data.add(row * matrix.row_stride + column * matrix.column_stride) })
    }

    /// Largest error over the sum of absolute products, in units of f32's rounding.
    fn check(terms: &[(Matrix<'_>, Matrix<'_>)], scale: f32, bias: Option<&[f32]>) {
        let (rows, columns) = (terms[0].0.rows, terms[0].1.columns);
        let mut results = Vec::new();
        for threads in [1, 2, 3] {
            let mut out = vec![f32::NAN; rows * columns];
            matmul("test", threads, &mut out, terms, scale, bias.map_or(Onto::Nothing, Onto::Bias)).unwrap();
            for row in 0..rows {
                for column in 0..columns {
                    let mut sum = bias.map_or(0.0, |bias| f64::from(bias[column]));
                    let mut size = sum.abs() + f64::from(f32::MIN_POSITIVE);
                    for (a, b) in terms {
                        for inner in 0..a.columns {
                            let product = f64::from(scale) * at(*a, row, inner) * at(*b, inner, column);
                            sum += product;
                            size += product.abs();
                        }
                    }
                    let error = (f64::from(out[row * columns + column]) - sum).abs() / size;
                    assert!(
                        error < 1e-5,
                        "{rows} x {columns}, {threads} threads: ({row}, {column}) is off by {error}"
                    );
                }
            }
            results.push(out);
        }
        for other in &results[1..] {
            assert_eq!(&results[0], other, "{rows} x {columns}: depends on the threads");
        }
        let before = numbers(rows * columns, 9);
        let mut sums = before.clone();
        matmul("test", 2, &mut sums, terms, scale, Onto::Itself).unwrap();
        let length: usize = terms.iter().map(|(a, _)| a.columns).sum();
        for (index, (after, before)) in sums.iter().zip(&before).enumerate() {
            let product = results[0][index] - bias.map_or(0.0, |bias| bias[index % columns]);
            let error = (after - before - product).abs();
            assert!(
                error < 1e-5 * (length as f32).max(1.0),
                "{rows} x {columns}: onto itself, {index} is off by {error}"
            );
        }
    }

    fn sizes() -> Vec<(usize, usize, usize)> {
        let mut sizes =
            vec![(1, 1, 1), (64, 33, 160), (77, 96, 50), (300, 16, 40), (16, 300, 65), (0, 4, 3), (3, 0, 5)];
        for count in [2, 7, 13, 14, 15, 16, 17, 28, 31, 32, 33, 63] {
            sizes.extend([(count, 40, 37), (37, count, 40), (40, 37, count)]);
        }
        sizes.extend([(40, 5000, 34), (5, 5000, 70), (130, 600, 33)]);
        sizes
    }

    /// Whether there is nothing to test here. Not through a macro: of a test that passes the harness shows none.
    fn lacks_avx512(test: &str) -> bool {
        let lacks = !is_x86_feature_detected!("avx512f");
        if lacks {
            writeln!(io::stderr(), "SKIPPED {test}: this processor lacks AVX-512").unwrap();
        }
        lacks
    }

    #[test]
    fn products_of_every_layout_are_those_of_float64() {
        if lacks_avx512("products_of_every_layout_are_those_of_float64") {
            return;
        }
        for (rows, inner, columns) in sizes() {
            let (a, b) = (numbers(rows * inner, 1), numbers(inner * columns, 2));
            let bias = numbers(columns, 3);
            let a = [Matrix::new(&a, rows, inner), Matrix::new(&a, inner, rows).transposed()];
            let b = [Matrix::new(&b, inner, columns), Matrix::new(&b, columns, inner).transposed()];
            for a in a {
                for b in b {
                    check(&[(a, b)], 1.0, None);
                    check(&[(a, b)], -0.75, Some(&bias));
                }
            }
        }
    }

    #[test]
    fn a_sum_of_products_is_one_sum() {
        if lacks_avx512("a_sum_of_products_is_one_sum") {
            return;
        }
        for (rows, inner, columns) in [(64, 100, 96), (100, 64, 33), (16, 4100, 48), (3, 5, 7)] {
            let rank = 4;
            let (x, w) = (numbers(rows * inner, 1), numbers(columns * inner, 2));
            let (h, b) = (numbers(rows * rank, 3), numbers(columns * rank, 4));
            let bias = numbers(columns, 5);
            let terms = [
                (Matrix::new(&x, rows, inner), Matrix::new(&w, columns, inner).transposed()),
                (Matrix::new(&h, rows, rank), Matrix::new(&b, columns, rank).transposed()),
            ];
            check(&terms, 1.0, Some(&bias));
        }
    }
}
