//! Noising: z_t, the training target and the repeated student batch in one pass.

mod cpu;
mod cuda;

use tch::{Device, Kind, Tensor};

use self::cpu::{Problem, Rates};
pub use self::cuda::variant;
use super::{compute_kind, threads};
use crate::cuda::Stream;
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{
    check_constant, check_float, check_shape, contiguous, device_of, elements, elements_mut, numbers,
};

const OP: &str = "noising";

/// What the model predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PredictionType {
    /// The noise.
    Epsilon,
    /// signal * noise - sigma * latent (Salimans & Ho, arXiv 2202.00512).
    Velocity,
    /// noise - latent (rectified flow).
    Flow,
}

impl PredictionType {
    /// From diffusers' name, or "flow".
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "epsilon" => Ok(Self::Epsilon),
            "v_prediction" | "velocity" => Ok(Self::Velocity),
            "flow" => Ok(Self::Flow),
            _ => {
                Err(CatError::value(OP, "prediction_type", "'epsilon', 'v_prediction' or 'flow'", format!("'{name}'")))
            }
        }
    }

    fn rates(self, signal: f64, noise: f64) -> Rates {
        let (target_signal, target_noise) = match self {
            Self::Epsilon => (0.0, 1.0),
            Self::Velocity => (-noise, signal),
            Self::Flow => (-1.0, 1.0),
        };
        Rates { signal, noise, target_signal, target_noise }
    }
}

/// z_t = signal_i * x_i + noise_i * n_i, written `copies` times along the batch, and the target.
///
/// latents and noise: [B, ...] of any float dtype, on the CPU or on a GPU, of which `stream` is a raw stream;
/// `signal_rate` and `noise_rate`: [B]. z_t has the latents' dtype and shape [copies * B, ...]; the target has the
/// noise's dtype and is the noise itself for epsilon.
pub fn noising(
    latents: &Tensor,
    noise: &Tensor,
    signal_rate: &Tensor,
    noise_rate: &Tensor,
    prediction_type: PredictionType,
    copies: usize,
    stream: u64,
) -> Result<(Tensor, Tensor)> {
    let on = device_of(OP, "latents", latents)?;
    let kinds = [check_float(OP, "latents", latents, on)?, check_float(OP, "noise", noise, on)?];
    let shape = latents.size();
    if shape.is_empty() || shape.contains(&0) {
        return Err(CatError::shape(OP, "latents", "[B, ...] with no empty dimension", &shape));
    }
    check_shape(OP, "noise", noise, &shape)?;
    check_constant(OP, "latents", latents)?;
    check_constant(OP, "noise", noise)?;
    if copies == 0 {
        return Err(CatError::value(OP, "copies", "at least 1", copies));
    }
    let batch = shape[0];
    let signal = check_rates(signal_rate, "signal_rate", batch, on)?;
    let sigma = check_rates(noise_rate, "noise_rate", batch, on)?;

    let (latents, noise) = (contiguous(OP, latents)?, contiguous(OP, noise)?);
    let mut doubled = shape.clone();
    doubled[0] = i64::try_from(copies)
        .ok()
        .and_then(|copies| batch.checked_mul(copies))
        .ok_or_else(|| CatError::value(OP, "copies", "few enough for a batch below 2^63", copies))?;
    let mut noisy = Tensor::f_empty(&doubled, (kinds[0], on)).during(OP)?;
    let mut target = match prediction_type {
        PredictionType::Epsilon => None,
        _ => Some(Tensor::f_empty(&shape, (kinds[1], on)).during(OP)?),
    };
    let kind = compute_kind(&kinds);
    if let Device::Cuda(gpu) = on {
        let problem = cuda::Problem {
            latents: &latents,
            noise: &noise,
            signal: &signal.f_to_kind(kind).during(OP)?,
            sigma: &sigma.f_to_kind(kind).during(OP)?,
            noisy: &noisy,
            copies: copies as u64,
            target: target.as_ref(),
            prediction_type,
            kind,
        };
        cuda::noising(&Stream::new(OP, gpu, stream)?, &problem)?;
        return Ok((noisy, target.unwrap_or(noise)));
    }
    let (signal, sigma) = (numbers(OP, &signal)?, numbers(OP, &sigma)?);
    let problem = Problem {
        latents: elements(OP, &latents)?,
        noise: elements(OP, &noise)?,
        rates: signal.iter().zip(&sigma).map(|(&signal, &noise)| prediction_type.rates(signal, noise)).collect(),
        noisy: elements_mut(OP, &mut noisy)?,
        copies,
        target: target.as_mut().map(|target| elements_mut(OP, target)).transpose()?,
    };
    match kind {
        Kind::Double => cpu::noising::<f64>(OP, threads(), &problem)?,
        _ => cpu::noising::<f32>(OP, threads(), &problem)?,
    }
    drop(problem);
    Ok((noisy, target.unwrap_or(noise)))
}

fn check_rates(rate: &Tensor, name: &'static str, batch: i64, on: Device) -> Result<Tensor> {
    check_float(OP, name, rate, on)?;
    check_shape(OP, name, rate, &[batch])?;
    contiguous(OP, rate)
}
