//! Means of values and their bootstrap intervals.

mod cpu;

pub use self::cpu::Statistic;
use self::cpu::{bootstrap, quantile, Samples};
use super::threads;
use crate::error::{CatError, Result};

/// Numbers, and the argument that holds them.
#[derive(Clone, Copy, Debug)]
pub struct Numbers<'a, T> {
    /// The argument's name.
    pub argument: &'static str,
    /// The numbers.
    pub values: &'a [T],
}

/// Values that are resampled together: of one sample, or of two that are compared.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a, const S: usize> {
    /// The samples, of equal length: a resample draws the same indices of all.
    pub samples: [Numbers<'a, f64>; S],
    /// A number a value: values with the same number are drawn together.
    pub clusters: Option<Numbers<'a, i64>>,
}

/// What a bootstrap interval depends on beside the values.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap {
    /// Of a group.
    pub statistic: Statistic,
    /// Coverage.
    pub confidence: f64,
    /// Bootstrap samples.
    pub resamples: i64,
    /// Of the resampling.
    pub seed: u64,
}

/// n / sum(1 / v_i); 0 where a value is 0.
pub fn harmonic_mean(values: &[f64]) -> Result<f64> {
    const OP: &str = "harmonic_mean";
    if values.is_empty() {
        return Err(CatError::value(OP, "values", "at least one number", "none"));
    }
    check_numbers(OP, &Numbers { argument: "values", values }, Statistic::HarmonicMean)?;
    Ok(Statistic::HarmonicMean.of(values))
}

/// A percentile bootstrap interval of the statistic of one group, or of the harmonic mean over several.
pub fn bootstrap_interval(groups: &[Group<1>], settings: Bootstrap) -> Result<(f64, f64)> {
    interval("bootstrap_interval", groups, settings, |[value]| value)
}

/// A percentile bootstrap interval of the second samples' statistic less the first's.
pub fn bootstrap_difference(op: &'static str, groups: &[Group<2>], settings: Bootstrap) -> Result<(f64, f64)> {
    interval(op, groups, settings, |[first, second]| second - first)
}

fn interval<const S: usize>(
    op: &'static str,
    groups: &[Group<S>],
    settings: Bootstrap,
    combine: impl Fn([f64; S]) -> f64,
) -> Result<(f64, f64)> {
    let Bootstrap { statistic, confidence, resamples, seed } = settings;
    if groups.is_empty() {
        return Err(CatError::value(op, "values", "at least one group", "none"));
    }
    if !(confidence > 0.0 && confidence < 1.0) {
        return Err(CatError::value(op, "confidence", "in (0, 1)", confidence));
    }
    if resamples < 2 {
        return Err(CatError::value(op, "resamples", "at least 2", resamples));
    }
    let samples = groups.iter().map(|group| checked(op, group, statistic)).collect::<Result<Vec<_>>>()?;
    let sorted = bootstrap(op, threads(), &samples, statistic, resamples as usize, seed, combine)?;
    let tail = (1.0 - confidence) / 2.0;
    Ok((quantile(&sorted, tail), quantile(&sorted, 1.0 - tail)))
}

fn checked<'a, const S: usize>(
    op: &'static str,
    group: &Group<'a, S>,
    statistic: Statistic,
) -> Result<Samples<'a, S>> {
    let first = &group.samples[0];
    if first.values.len() < 2 {
        return Err(CatError::value(op, first.argument, "at least two numbers to resample", first.values.len()));
    }
    for sample in &group.samples {
        check_count(op, sample, first)?;
        check_numbers(op, sample, statistic)?;
    }
    if let Some(clusters) = &group.clusters {
        check_count(op, clusters, first)?;
        if clusters.values.iter().all(|&cluster| cluster == clusters.values[0]) {
            return Err(CatError::value(op, clusters.argument, "at least two clusters to resample", 1));
        }
    }
    Ok(Samples {
        values: group.samples.map(|sample| sample.values),
        clusters: group.clusters.map(|clusters| clusters.values),
    })
}

fn check_count<T>(op: &'static str, numbers: &Numbers<T>, first: &Numbers<f64>) -> Result<()> {
    let expected = first.values.len();
    if numbers.values.len() == expected {
        return Ok(());
    }
    let expected = format!("as many numbers as `{}`, {expected}", first.argument);
    Err(CatError::value(op, numbers.argument, expected, numbers.values.len()))
}

fn check_numbers(op: &'static str, numbers: &Numbers<f64>, statistic: Statistic) -> Result<()> {
    let &Numbers { argument, values } = numbers;
    let at = |index: usize| format!("{} at index {index}", values[index]);
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(CatError::value(op, argument, "finite", at(index)));
    }
    match values.iter().position(|value| statistic == Statistic::HarmonicMean && *value < 0.0) {
        Some(index) => Err(CatError::value(op, argument, ">= 0 for a harmonic mean", at(index))),
        None => Ok(()),
    }
}
