//! Means and bootstrap intervals, for `cat_rs.ops.statistics`.

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use super::convert::{argument, Expected};
use super::{interruptible, released};
use crate::ops;
use crate::ops::statistics::{Bootstrap, Group, Numbers, Statistic};

type Values<'py> = PyReadonlyArray1<'py, f64>;
type Clusters<'py> = Option<PyReadonlyArray1<'py, i64>>;

type Groups<'py> = Vec<(Values<'py>, Clusters<'py>)>;

impl Expected for Groups<'_> {
    const EXPECTED: &'static str = "a sequence of (float64 array, int64 array or None)";
}

impl Expected for [Values<'_>; 2] {
    const EXPECTED: &'static str = "two float64 arrays";
}

impl Expected for [Clusters<'_>; 2] {
    const EXPECTED: &'static str = "two of int64 array or None";
}

fn numbers<'a>(argument: &'static str, values: &'a Values<'_>) -> PyResult<Numbers<'a, f64>> {
    Ok(Numbers { argument, values: values.as_slice()? })
}

fn cluster_numbers<'a>(argument: &'static str, clusters: &'a Clusters<'_>) -> PyResult<Option<Numbers<'a, i64>>> {
    clusters.as_ref().map(|clusters| Ok(Numbers { argument, values: clusters.as_slice()? })).transpose()
}

fn statistic(harmonic: bool) -> Statistic {
    if harmonic {
        Statistic::HarmonicMean
    } else {
        Statistic::Mean
    }
}

/// See `cat_rs.harmonic_mean`.
#[pyfunction]
pub fn harmonic_mean(py: Python<'_>, values: PyReadonlyArray1<'_, f64>) -> PyResult<f64> {
    let values = numbers("values", &values)?.values;
    released(py, || ops::statistics::harmonic_mean(values))
}

/// See `cat_rs.bootstrap_interval`; several groups are resampled apart and joined by their harmonic mean.
#[pyfunction]
#[pyo3(signature = (groups, *, harmonic, confidence, resamples, seed))]
pub fn bootstrap_interval(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] groups: Groups<'_>,
    harmonic: bool,
    #[pyo3(from_py_with = argument)] confidence: f64,
    #[pyo3(from_py_with = argument)] resamples: i64,
    #[pyo3(from_py_with = argument)] seed: u64,
) -> PyResult<(f64, f64)> {
    let groups = groups
        .iter()
        .map(|(values, clusters)| {
            let samples = [numbers("values", values)?];
            Ok(Group { samples, clusters: cluster_numbers("clusters", clusters)? })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let settings = Bootstrap { statistic: statistic(harmonic), confidence, resamples, seed };
    interruptible(py, || ops::statistics::bootstrap_interval(&groups, settings))
}

/// See `cat_rs.bootstrap_difference`.
#[pyfunction]
#[pyo3(signature = (a, b, clusters, *, harmonic, confidence, resamples, seed))]
#[allow(clippy::too_many_arguments)]
pub fn bootstrap_difference(
    py: Python<'_>,
    a: Values<'_>,
    b: Values<'_>,
    clusters: Clusters<'_>,
    harmonic: bool,
    #[pyo3(from_py_with = argument)] confidence: f64,
    #[pyo3(from_py_with = argument)] resamples: i64,
    #[pyo3(from_py_with = argument)] seed: u64,
) -> PyResult<(f64, f64)> {
    let samples = [numbers("a", &a)?, numbers("b", &b)?];
    let group = Group { samples, clusters: cluster_numbers("clusters", &clusters)? };
    let settings = Bootstrap { statistic: statistic(harmonic), confidence, resamples, seed };
    interruptible(py, || ops::statistics::bootstrap_difference("bootstrap_difference", &[group], settings))
}

/// See `cat_rs.kps_difference`.
#[pyfunction]
#[pyo3(signature = (a, b, clusters, *, confidence, resamples, seed))]
pub fn kps_difference(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] a: [Values<'_>; 2],
    #[pyo3(from_py_with = argument)] b: [Values<'_>; 2],
    #[pyo3(from_py_with = argument)] clusters: [Clusters<'_>; 2],
    #[pyo3(from_py_with = argument)] confidence: f64,
    #[pyo3(from_py_with = argument)] resamples: i64,
    #[pyo3(from_py_with = argument)] seed: u64,
) -> PyResult<(f64, f64)> {
    let groups = [
        Group {
            samples: [numbers("a[0]", &a[0])?, numbers("b[0]", &b[0])?],
            clusters: cluster_numbers("clusters[0]", &clusters[0])?,
        },
        Group {
            samples: [numbers("a[1]", &a[1])?, numbers("b[1]", &b[1])?],
            clusters: cluster_numbers("clusters[1]", &clusters[1])?,
        },
    ];
    let settings = Bootstrap { statistic: Statistic::HarmonicMean, confidence, resamples, seed };
    interruptible(py, || ops::statistics::bootstrap_difference("kps_difference", &groups, settings))
}
