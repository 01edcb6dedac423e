//! Launches of the similarities.

use std::ffi::CStr;

use tch::{Device, Kind, Tensor};

use super::{Reduce, OP};
use crate::cuda::{Define, Kernel, Program, Stream, Variant, THREADS};
use crate::error::{Result, TorchContext};
use crate::ops::{dtype, real_of};
use crate::tensor::address;

static PROGRAM: Program = Program { name: "similarity", source: include_str!("kernel.cu") };

/// From this many elements on, a block works on a row together.
const LONG_ROW: u64 = 8192;
/// Rows of `a`, or of `b`, that a block compares at a time: TILE of kernel.cu.
const TILE: u64 = 64;
/// Blocks over whose shares of the rows a mean is summed.
const MEAN_BLOCKS: u64 = 64;

/// What is computed of a pair of rows: `Paired::result` of kernel.cu.
#[derive(Clone, Copy)]
enum PairResult {
    Similarity = 0,
    SimilarityToUnit = 1,
    Norm = 2,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PairedParameter {
    a: u64,
    b: u64,
    values: u64,
    rows: u64,
    dim: u64,
    b_stride: u64,
    block_per_row: u64,
    result: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DirectionMeanParameter {
    b: u64,
    norms: u64,
    partials: u64,
    rows: u64,
    dim: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumRowsParameter {
    partials: u64,
    sums: u64,
    rows: u64,
    dim: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CrossMaxParameter {
    a: u64,
    b: u64,
    a_norms: u64,
    b_norms: u64,
    best: u64,
    a_rows: u64,
    b_rows: u64,
    dim: u64,
}

fn defines(kind: Kind, a: Kind, b: Kind) -> [Define; 3] {
    [("REAL", dtype(kind)), ("EMBEDDING_A", dtype(a)), ("EMBEDDING_B", dtype(b))]
}

/// The kernels for embeddings of one dtype.
pub fn variant(kind: Kind) -> Variant {
    Variant { program: &PROGRAM, defines: defines(real_of(kind), kind, kind).to_vec() }
}

/// Kernels that compute in `kind`, on one stream.
#[derive(Debug)]
pub struct Similarities<'s> {
    /// The stream.
    pub stream: &'s Stream<'s>,
    /// Its device.
    pub on: Device,
    /// float32 or float64
    pub kind: Kind,
}

impl Similarities<'_> {
    /// s(a_i, b_i), [N] float64; NaN where a row is zero or not finite. a, b: [N, D], contiguous.
    pub fn paired(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.pairs(a, b, dim(a), PairResult::Similarity)
    }

    /// The norms of rows, [N] float64.
    pub fn norms(&self, rows: &Tensor) -> Result<Tensor> {
        self.pairs(rows, rows, dim(rows), PairResult::Norm)
    }

    /// The mean or maximum over j of s(a_i, b_j), [N] float64; NaN where a row is zero or not finite.
    pub fn cross(&self, a: &Tensor, b: &Tensor, reduce: Reduce) -> Result<Tensor> {
        match reduce {
            // By linearity: against the mean of b's normalized rows.
            Reduce::Mean => self.pairs(a, &self.direction_mean(b)?, 0, PairResult::SimilarityToUnit),
            Reduce::Max => self.cross_max(a, b),
        }
    }

    fn pairs(&self, a: &Tensor, b: &Tensor, b_stride: u64, result: PairResult) -> Result<Tensor> {
        let (rows, dim) = (count(a), dim(a));
        let values = self.empty([rows], Kind::Double)?;
        let block_per_row = dim >= LONG_ROW;
        let parameter = PairedParameter {
            a: address(OP, a)?,
            b: address(OP, b)?,
            values: address(OP, &values)?,
            rows,
            dim,
            b_stride,
            block_per_row: block_per_row.into(),
            result: result as u64,
        };
        let rows_per_block = if block_per_row { 1 } else { u64::from(THREADS) / 32 };
        let blocks = self.stream.blocks(rows.div_ceil(rows_per_block));
        let defines = self.defines(a, b)?;
        // SAFETY: Paired of kernel.cu, on PyTorch's memory.
        unsafe { self.stream.launch(kernel(c"paired", &defines), [blocks, 1], &parameter)? };
        Ok(values)
    }

    /// The mean of the rows b_j / |b_j|, [D] in `kind`.
    fn direction_mean(&self, b: &Tensor) -> Result<Tensor> {
        let (rows, dim) = (count(b), dim(b));
        let norms = self.norms(b)?;
        let blocks = rows.min(MEAN_BLOCKS);
        let partials = self.empty([blocks, dim], Kind::Double)?;
        let mean = self.empty([dim], self.kind)?;
        let shares = DirectionMeanParameter {
            b: address(OP, b)?,
            norms: address(OP, &norms)?,
            partials: address(OP, &partials)?,
            rows,
            dim,
        };
        let sums = SumRowsParameter { partials: shares.partials, sums: address(OP, &mean)?, rows: blocks, dim };
        let columns = blocks_of(dim, u64::from(THREADS));
        let defines = self.defines(b, b)?;
        // SAFETY: DirectionMean and SumRows of kernel.cu, on PyTorch's memory.
        unsafe {
            self.stream.launch(kernel(c"direction_mean", &defines), [blocks as u32, columns], &shares)?;
            self.stream.launch(kernel(c"sum_rows", &defines), [columns, 1], &sums)?;
        }
        Ok(mean)
    }

    fn cross_max(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (a_norms, b_norms) = (self.norms(a)?, self.norms(b)?);
        let a_tiles = blocks_of(count(a), TILE);
        // Few rows of a leave blocks to share the rows of b.
        let splits = (self.stream.blocks(u64::MAX) / a_tiles).clamp(1, blocks_of(count(b), TILE).min(256));
        let best = self.empty([splits.into(), count(a)], Kind::Double)?;
        let parameter = CrossMaxParameter {
            a: address(OP, a)?,
            b: address(OP, b)?,
            a_norms: address(OP, &a_norms)?,
            b_norms: address(OP, &b_norms)?,
            best: address(OP, &best)?,
            a_rows: count(a),
            b_rows: count(b),
            dim: dim(a),
        };
        let defines = self.defines(a, b)?;
        // SAFETY: CrossMax of kernel.cu, on PyTorch's memory.
        unsafe { self.stream.launch(kernel(c"cross_max", &defines), [a_tiles, splits], &parameter)? };
        best.f_amax([0i64].as_slice(), false).during(OP)
    }

    fn defines(&self, a: &Tensor, b: &Tensor) -> Result<[Define; 3]> {
        Ok(defines(self.kind, a.f_kind().during(OP)?, b.f_kind().during(OP)?))
    }

    fn empty<const DIMS: usize>(&self, size: [u64; DIMS], kind: Kind) -> Result<Tensor> {
        Tensor::f_empty(size.map(|length| length as i64).as_slice(), (kind, self.on)).during(OP)
    }
}

fn kernel<'a>(name: &'static CStr, defines: &'a [Define]) -> Kernel<'a> {
    Kernel { program: &PROGRAM, defines, name }
}

/// Rows.
fn count(rows: &Tensor) -> u64 {
    rows.numel() as u64 / dim(rows)
}

/// Elements of a row.
fn dim(rows: &Tensor) -> u64 {
    rows.size().last().map_or(1, |&dim| dim as u64)
}

fn blocks_of(pieces: u64, per_block: u64) -> u32 {
    u32::try_from(pieces.div_ceil(per_block)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::{cross_similarity, similarity};
    use super::*;
    use crate::cuda::fake;

    #[test]
    fn launches_equal_the_cpus_kernel() {
        for (a_kind, b_kind) in [(Kind::Float, Kind::Float), (Kind::BFloat16, Kind::Float), (Kind::Half, Kind::Double)]
        {
            let kind = crate::ops::compute_kind(&[a_kind, b_kind]);
            let random = |size: [i64; 2], kind| {
                Tensor::f_randn(size, (Kind::Float, Device::Cpu)).unwrap().f_to_kind(kind).unwrap()
            };
            for (rows, others, width) in [(5, 5, 77), (70, 130, 24), (2, 2, 9001)] {
                let (a, b) = (random([rows, width], a_kind), random([others, width], b_kind));
                let pair = b.f_narrow(0, 0, rows).unwrap();
                fake::with_stream(OP, |stream| {
                    let kernels = Similarities { stream, on: Device::Cpu, kind };
                    let close = |ours: Tensor, theirs: Tensor| {
                        assert!(ours.f_to_kind(kind).unwrap().f_allclose(&theirs, 1e-6, 1e-6, false).unwrap());
                    };
                    close(kernels.paired(&a, &pair).unwrap(), similarity(&a, &pair, 0).unwrap());
                    for reduce in [Reduce::Mean, Reduce::Max] {
                        let expected = cross_similarity(&a, &b, reduce, 0).unwrap();
                        close(kernels.cross(&a, &b, reduce).unwrap(), expected);
                    }
                    let norms = kernels.norms(&a).unwrap();
                    let expected =
                        a.f_to_kind(Kind::Double).unwrap().f_norm_scalaropt_dim(2, [1i64].as_slice(), false);
                    assert!(norms.f_allclose(&expected.unwrap(), 1e-6, 0.0, false).unwrap());
                });
            }
        }
    }
}
