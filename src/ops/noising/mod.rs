//! Noising: z_t, the training target and the repeated student batch in one pass.

mod cpu;

use tch::{Device, Kind, Tensor};

use self::cpu::{Problem, Rates};
use super::{compute_kind, threads};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{check_constant, check_float, check_shape, contiguous, elements, elements_mut};

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
/// latents and noise: [B, ...] of any float dtype; `signal_rate` and `noise_rate`: [B]. z_t has the latents'
/// dtype and shape [copies * B, ...]; the target has the noise's dtype and is the noise itself for epsilon.
pub fn noising(
    latents: &Tensor,
    noise: &Tensor,
    signal_rate: &Tensor,
    noise_rate: &Tensor,
    prediction_type: PredictionType,
    copies: usize,
) -> Result<(Tensor, Tensor)> {
    let kinds = [check_float(OP, "latents", latents)?, check_float(OP, "noise", noise)?];
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
    let signal = rates(signal_rate, "signal_rate", batch)?;
    let sigma = rates(noise_rate, "noise_rate", batch)?;

    let (latents, noise) = (contiguous(OP, latents)?, contiguous(OP, noise)?);
    let mut doubled = shape.clone();
    doubled[0] *= copies as i64;
    let mut noisy = Tensor::f_empty(&doubled, (kinds[0], Device::Cpu)).during(OP)?;
    let mut target = match prediction_type {
        PredictionType::Epsilon => None,
        _ => Some(Tensor::f_empty(&shape, (kinds[1], Device::Cpu)).during(OP)?),
    };
    let problem = Problem {
        latents: elements(OP, &latents)?,
        noise: elements(OP, &noise)?,
        rates: signal.iter().zip(&sigma).map(|(&signal, &noise)| prediction_type.rates(signal, noise)).collect(),
        noisy: elements_mut(OP, &mut noisy)?,
        copies,
        target: target.as_mut().map(|target| elements_mut(OP, target)).transpose()?,
    };
    match compute_kind(&kinds) {
        Kind::Double => cpu::noising::<f64>(OP, threads(), &problem)?,
        _ => cpu::noising::<f32>(OP, threads(), &problem)?,
    }
    drop(problem);
    Ok((noisy, target.unwrap_or(noise)))
}

fn rates(rate: &Tensor, name: &'static str, batch: i64) -> Result<Vec<f64>> {
    check_float(OP, name, rate)?;
    check_shape(OP, name, rate, &[batch])?;
    let rate = contiguous(OP, rate)?;
    let mut rates = vec![0.0f64; batch as usize];
    elements(OP, &rate)?.copy_into(&mut rates);
    Ok(rates)
}
