//! Files of LoRA adapters: safetensors on disk, and the names and layers of the formats "diffusers", "peft" and
//! "kohya".

mod disk;
mod layers;
mod names;
mod patterns;

use std::collections::BTreeMap;

use tch::{Device, Tensor};

pub use self::disk::{read, write, Source};
pub use self::layers::{layers_of, tensors_of};
pub use self::patterns::names_that_fit;

use crate::error::{CatError, Result};
use crate::tensor::check_dense;

/// Checks a tensor that has a name: dense, on the CPU, with memory for its elements, of a dtype that files hold.
fn check_named(op: &'static str, name: &str, tensor: &Tensor) -> Result<()> {
    check_dense(op, "tensors", tensor, Device::Cpu).map_err(|error| {
        let text = match error {
            CatError::Layout { expected, got, .. } => format!("`{name}` must be {expected}, got {got}"),
            CatError::Device { expected, got, .. } => format!("`{name}` must be on {expected}, got a tensor on {got}"),
            other => format!("`{name}`: {other}"),
        };
        CatError::adapter(op, text)
    })?;
    disk::dtype_of(op, name, tensor).map(drop)
}

/// The tensors of a file by name, in its order.
pub type NamedTensors = Vec<(String, Tensor)>;
/// A file's free text by key.
pub type Metadata = BTreeMap<String, String>;
/// Component to the names of its modules, as the model has them.
pub type KnownModules = BTreeMap<String, Vec<String>>;

/// How a file names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `unet.<module>.lora_A.weight`, scales in the metadata.
    Diffusers,
    /// `base_model.model.<module>.lora_A.weight`, one component, scales in `adapter_config.json`.
    Peft,
    /// `lora_unet_<module with underscores>.lora_down.weight`, scales as `.alpha` tensors.
    Kohya,
}

impl Format {
    /// The format of a name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "diffusers" => Ok(Self::Diffusers),
            "peft" => Ok(Self::Peft),
            "kohya" => Ok(Self::Kohya),
            other => Err(CatError::value("save_lora", "format", "diffusers, peft or kohya", other)),
        }
    }

    /// The name that `parse` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::Peft => "peft",
            Self::Kohya => "kohya",
        }
    }
}

/// The models that kohya has names for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.x and 2.x.
    Sd,
    /// Stable Diffusion XL.
    Sdxl,
    /// FLUX.1
    Flux,
}

impl Family {
    /// The family of a name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "sd" => Ok(Self::Sd),
            "sdxl" => Ok(Self::Sdxl),
            "flux" => Ok(Self::Flux),
            other => Err(CatError::value("save_lora", "family", "sd, sdxl or flux", other)),
        }
    }

    /// The name that `parse` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sd => "sd",
            Self::Sdxl => "sdxl",
            Self::Flux => "flux",
        }
    }
}

/// One adapted layer, in PEFT's words.
#[derive(Debug)]
pub struct Layer {
    /// `unet`, `transformer`, `text_encoder` or `text_encoder_2`; empty where a PEFT file does not tell.
    pub component: String,
    /// The module's name inside the component.
    pub module: String,
    /// A: [r, in] or [r, in, kh, kw].
    pub lora_a: Tensor,
    /// B: [out, r] or [out, r, 1, 1].
    pub lora_b: Tensor,
    /// The bias of B, where the layer has one.
    pub bias: Option<Tensor>,
    /// DoRA's magnitude, where the layer has one.
    pub magnitude: Option<Tensor>,
    /// The layer adds alpha / r * B A; `None` where the tensors do not tell.
    pub alpha: Option<f64>,
}

impl Layer {
    /// r
    pub fn rank(&self) -> i64 {
        self.lora_a.size().first().copied().unwrap_or(0)
    }
}

/// What the tensors of a file are.
#[derive(Debug)]
pub struct Adapter {
    /// How they were named.
    pub format: Format,
    /// The model's family, where the names tell.
    pub family: Option<Family>,
    /// The layers, sorted by component and module.
    pub layers: Vec<Layer>,
}
