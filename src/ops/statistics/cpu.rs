//! CPU kernel of the bootstrap.

use crate::cpu::{filled, for_each_task, DisjointMut};
use crate::error::Result;

/// Draws of a task.
const TASK: usize = 4096;
const RESAMPLES: &str = "resamples";

/// How a group of values becomes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// The arithmetic mean.
    Mean,
    /// The harmonic mean.
    HarmonicMean,
}

impl Statistic {
    /// What is summed for a value.
    fn term(self, value: f64) -> f64 {
        match self {
            Self::Mean => value,
            Self::HarmonicMean => value.recip(),
        }
    }

    /// The statistic from the mean of the terms.
    fn finish(self, mean: f64) -> f64 {
        match self {
            Self::Mean => mean,
            Self::HarmonicMean => mean.recip(),
        }
    }

    /// The statistic of `values`.
    pub fn of(self, values: &[f64]) -> f64 {
        self.finish(values.iter().map(|&value| self.term(value)).sum::<f64>() / values.len() as f64)
    }
}

/// Samples of equal length, and for each index the number of its cluster.
#[derive(Clone, Copy, Debug)]
pub struct Samples<'a, const S: usize> {
    /// The values.
    pub values: [&'a [f64]; S],
    /// Where none, every value is drawn by itself.
    pub clusters: Option<&'a [i64]>,
}

/// What resamples are drawn from: the terms of the samples, added up within each cluster.
struct Urn<const S: usize> {
    terms: Vec<[f64; S]>,
    /// Values a cluster, where there are clusters.
    sizes: Option<Vec<f64>>,
}

impl<const S: usize> Urn<S> {
    fn new(statistic: Statistic, samples: &Samples<S>) -> Self {
        let count = samples.values[0].len();
        let term = |index: usize| samples.values.map(|values| statistic.term(values[index]));
        let Some(clusters) = samples.clusters else {
            return Self { terms: (0..count).map(term).collect(), sizes: None };
        };
        let mut order: Vec<usize> = (0..count).collect();
        // By index within a cluster, so that a sum is always taken in the same order.
        order.sort_unstable_by_key(|&index| (clusters[index], index));
        let members = order.chunk_by(|&left, &right| clusters[left] == clusters[right]);
        let sum = |members: &[usize]| members.iter().fold([0.0; S], |sum, &index| added(sum, term(index)));
        let (terms, sizes) = members.map(|members| (sum(members), members.len() as f64)).unzip();
        Self { terms, sizes: Some(sizes) }
    }

    /// The mean terms of one resample: of all samples by the same draws.
    fn draw(&self, random: &mut SplitMix64) -> [f64; S] {
        let count = self.terms.len();
        let draws = (0..count).map(|_| random.below(count));
        let (sums, size) = match &self.sizes {
            None => (draws.fold([0.0; S], |sums, index| added(sums, self.terms[index])), count as f64),
            Some(sizes) => draws
                .fold(([0.0; S], 0.0), |(sums, size), index| (added(sums, self.terms[index]), size + sizes[index])),
        };
        sums.map(|sum| sum / size)
    }
}

#[inline(always)]
fn added<const S: usize>(sums: [f64; S], terms: [f64; S]) -> [f64; S] {
    std::array::from_fn(|sample| sums[sample] + terms[sample])
}

/// `combine` of the statistics of S samples in each of `resamples` bootstrap samples, sorted.
///
/// Every group is resampled by itself; with several groups a sample's statistic is the harmonic mean over the groups.
/// Draws depend on `seed` and the resample's number alone, not on threads.
pub fn bootstrap<const S: usize>(
    op: &'static str,
    threads: usize,
    groups: &[Samples<S>],
    statistic: Statistic,
    resamples: usize,
    seed: u64,
    combine: impl Fn([f64; S]) -> f64,
) -> Result<Vec<f64>> {
    let join = groups.len() > 1;
    let mut random = filled(op, RESAMPLES, resamples, SplitMix64(0))?;
    for (resample, generator) in random.iter_mut().enumerate() {
        *generator = SplitMix64::new(seed, resample as u64);
    }
    let mut sums = filled(op, RESAMPLES, resamples, [0.0f64; S])?;
    for group in groups {
        // One at a time: an urn can be as large as the values.
        let urn = Urn::new(statistic, group);
        let (random, sums) = (DisjointMut::new(&mut random), DisjointMut::new(&mut sums));
        let per_task = (TASK / urn.terms.len()).max(1);
        for_each_task(op, threads, resamples.div_ceil(per_task), |task| {
            let start = task * per_task;
            let len = per_task.min(resamples - start);
            // SAFETY: every task uses the generators and the sums of its own resamples.
            let (random, sums) = unsafe { (random.range(start, len), sums.range(start, len)) };
            for (random, sums) in random.iter_mut().zip(sums) {
                let statistics = urn.draw(random).map(|mean| statistic.finish(mean));
                *sums = added(*sums, if join { statistics.map(f64::recip) } else { statistics });
            }
        })?;
    }
    let finish = |sum: f64| if join { groups.len() as f64 / sum } else { sum };
    let mut values = filled(op, RESAMPLES, resamples, 0.0)?;
    for (value, sums) in values.iter_mut().zip(sums) {
        *value = combine(sums.map(finish));
    }
    // In place: a stable sort would allocate.
    values.sort_unstable_by(f64::total_cmp);
    Ok(values)
}

/// The `fraction` quantile of sorted values, interpolated linearly.
pub fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let position = fraction * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    low + (high - low) * position.fract()
}

/// Steele, Lea & Flood's generator (OOPSLA 2014): one multiplication chain a draw, any seed is good.
#[derive(Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn new(seed: u64, stream: u64) -> Self {
        let mut generator = Self(seed);
        let mixed = generator.next() ^ stream.wrapping_mul(0xd134_2543_de82_ef95);
        Self(mixed)
    }

    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in 0..bound; the bias, bound / 2^64, is far below what a bootstrap resolves.
    #[inline(always)]
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}
