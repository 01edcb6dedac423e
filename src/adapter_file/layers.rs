//! Tensors by name to layers, and back. FLUX files of kohya hold query, key and value as one layer: these are split
//! and joined here.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::names::{
    diffusers_key, is_kohya, is_tabled, parse_dotted, parse_kohya, peft_key, Key, KohyaNames, Part, Slot, Target,
    ANY_DENOISER, COMPONENTS,
};
use super::{check_named, Adapter, Family, Format, KnownModules, Layer, NamedTensors};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{dtype_name, from_bytes};

const READ: &str = "load_lora";
const WRITE: &str = "save_lora";
/// How many names an error lists.
const LISTED: usize = 8;
/// How to read what only diffusers has tables for.
const ADVICE: &str =
    "; what diffusers reads, pipe.load_lora_weights(file, adapter_name=\"other\") gives to a pipeline's \
    models, and save_lora(path, pipe.transformer, adapter_name=\"other\") writes";

/// Component and module, or nothing and kohya's name.
type Place = (String, String);
type Parts = BTreeMap<Part, (String, Tensor)>;

/// The layers of tensors by name, for the operation `op`.
///
/// `known` holds the module names of the models that the adapter is for, where the caller has them.
pub fn layers_of(op: &'static str, tensors: NamedTensors, known: &KnownModules) -> Result<Adapter> {
    found_layers(tensors, known).map_err(|error| error.of(op))
}

fn found_layers(tensors: NamedTensors, known: &KnownModules) -> Result<Adapter> {
    if tensors.is_empty() {
        return Err(CatError::adapter(READ, "expected tensors of a LoRA, got none"));
    }
    for (name, tensor) in &tensors {
        check_named(READ, name, tensor)?;
    }
    // A file may name its layers in several ways at once.
    let (kohya, dotted): (NamedTensors, NamedTensors) = tensors.into_iter().partition(|(name, _)| is_kohya(name));
    let (kohya, dotted) = places_of(kohya, dotted)?;
    let named = !kohya.is_empty() || dotted.keys().any(|(component, _)| !component.is_empty());
    let unnamed: Vec<&str> = dotted
        .keys()
        .filter(|(component, _)| named && component.is_empty())
        .map(|(_, module)| module.as_str())
        .collect();
    if !unnamed.is_empty() {
        let expected = format!("names that start with one of {}", COMPONENTS.join(", "));
        return Err(CatError::adapter(READ, format!("expected {expected}, got {}{ADVICE}", listed(&unnamed))));
    }
    let mut format = if named { Format::Diffusers } else { Format::Peft };
    let mut found = Found::default();
    let (denoiser, dotted): (Vec<_>, Vec<_>) = dotted.into_iter().partition(|(place, _)| place.0 == ANY_DENOISER);
    for (place, parts) in dotted {
        found.add(layer(place, parts)?, 0)?;
    }
    let names = KohyaNames::new(known);
    let tabled = denoiser.iter().any(|((_, module), _)| is_tabled(module));
    for ((_, module), parts) in denoiser {
        let targets = names.resolve_denoiser(&module, tabled);
        found.add_target(module, targets, parts, 0)?;
    }
    for ((_, name), parts) in kohya {
        format = Format::Kohya;
        let rank = if name.starts_with("lora_unet_") { 2 } else { 1 };
        let targets = names.resolve(&name);
        found.add_target(name, targets, parts, rank)?;
    }
    found.adapter(format)
}

/// The tensors of a format; `family` is needed for kohya's alone.
pub fn tensors_of(layers: &[Layer], format: Format, family: Option<Family>) -> Result<NamedTensors> {
    if layers.is_empty() {
        return Err(CatError::adapter(WRITE, "expected an adapter with layers, got none"));
    }
    for layer in layers {
        for (part, tensor) in parts_of(layer) {
            check_named(WRITE, &peft_key(&layer.module, part), tensor)?;
        }
    }
    if format == Format::Kohya {
        let Some(family) = family else {
            let expected = "sd, sdxl or flux: this model's is not recognized";
            return Err(CatError::value(WRITE, "family", expected, "None"));
        };
        return to_kohya(layers, family);
    }
    let mut tensors = NamedTensors::new();
    for layer in layers {
        if format == Format::Diffusers && !COMPONENTS.contains(&layer.component.as_str()) {
            let text = format!("the component must be one of {}, got {:?}", COMPONENTS.join(", "), layer.component);
            return Err(CatError::adapter(WRITE, text));
        }
        for (part, tensor) in parts_of(layer) {
            let name = match format {
                Format::Diffusers => diffusers_key(&layer.component, &layer.module, part),
                _ => peft_key(&layer.module, part),
            };
            tensors.push((name, tensor.shallow_clone()));
        }
    }
    Ok(tensors)
}

fn parts_of(layer: &Layer) -> impl Iterator<Item = (Part, &Tensor)> {
    [
        (Part::A, Some(&layer.lora_a)),
        (Part::B, Some(&layer.lora_b)),
        (Part::Bias, layer.bias.as_ref()),
        (Part::Magnitude, layer.magnitude.as_ref()),
    ]
    .into_iter()
    .filter_map(|(part, tensor)| Some((part, tensor?)))
}

/// The parts of the layers that kohya's names stand for, and of those that paths stand for.
fn places_of(kohya: NamedTensors, dotted: NamedTensors) -> Result<(BTreeMap<Place, Parts>, BTreeMap<Place, Parts>)> {
    let mut unknown = Vec::new();
    let places = (by_place(kohya, parse_kohya, &mut unknown)?, by_place(dotted, parse_dotted, &mut unknown)?);
    refuse_unknown(&unknown)?;
    Ok(places)
}

fn by_place(
    tensors: NamedTensors,
    parse: fn(&str) -> Option<Key>,
    unknown: &mut Vec<String>,
) -> Result<BTreeMap<Place, Parts>> {
    let mut places: BTreeMap<Place, Parts> = BTreeMap::new();
    for (name, tensor) in tensors {
        let Some(key) = parse(&name) else {
            unknown.push(name);
            continue;
        };
        let parts = places.entry((key.component, key.module)).or_default();
        if let Some((other, _)) = parts.get(&key.part) {
            return Err(CatError::adapter(READ, format!("`{name}` and `{other}` are the same tensor of a layer")));
        }
        parts.insert(key.part, (name, tensor));
    }
    Ok(places)
}

fn refuse_unknown(names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let dora = if names.iter().any(|name| name.ends_with(".dora_scale")) {
        " (DoRA in kohya's format is not supported)"
    } else {
        ""
    };
    let text = format!("expected tensors of LoRA layers, got unknown names: {}{dora}{ADVICE}", listed(&names));
    Err(CatError::adapter(READ, text))
}

fn listed(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(LISTED).map(|name| format!("`{name}`")).collect();
    let more = names.len() - shown.len();
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{rest}", shown.join(", "))
}

/// A layer from its parts, checked.
fn layer((component, module): Place, mut parts: Parts) -> Result<Layer> {
    let (Some((name_a, lora_a)), Some((name_b, lora_b))) = (parts.remove(&Part::A), parts.remove(&Part::B)) else {
        let text = format!("`{module}` must have both matrices of a LoRA, got one");
        return Err(CatError::adapter(READ, text));
    };
    for (name, tensor) in [(&name_a, &lora_a), (&name_b, &lora_b)] {
        let kind = tensor.f_kind().during(READ)?;
        if !is_float(kind) {
            let expected = "float32, float64, bfloat16 or float16";
            let text = format!("`{name}` must have dtype {expected}, got {}", dtype_name(kind));
            return Err(CatError::adapter(READ, text));
        }
    }
    let (a, b) = (lora_a.size(), lora_b.size());
    if a.len() < 2 || a.len() != b.len() || a[0] != b[1] || a[0] == 0 {
        let text =
            format!("`{name_a}` must be [r, ...] and `{name_b}` [out, r, ...] with r >= 1, got {a:?} and {b:?}");
        return Err(CatError::adapter(READ, text));
    }
    let alpha = parts.remove(&Part::Alpha).map(|(name, tensor)| scalar(&name, &tensor)).transpose()?;
    let mut rest = |part| parts.remove(&part).map(|(_, tensor)| tensor);
    let (bias, magnitude) = (rest(Part::Bias), rest(Part::Magnitude));
    Ok(Layer { component, module, lora_a, lora_b, bias, magnitude, alpha })
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}

fn scalar(name: &str, tensor: &Tensor) -> Result<f64> {
    if tensor.numel() != 1 {
        let text = format!("`{name}` must be one number, got shape {:?}", tensor.size());
        return Err(CatError::adapter(READ, text));
    }
    let value = tensor.f_view([1]).and_then(|tensor| tensor.f_double_value(&[0])).during(READ)?;
    if !value.is_finite() {
        return Err(CatError::adapter(READ, format!("`{name}` must be a finite number, got {value}")));
    }
    Ok(value)
}

/// The layers found so far, and what stood for none.
#[derive(Default)]
struct Found {
    /// By place, with the rank of the name that stood for it.
    layers: BTreeMap<Place, (Layer, usize)>,
    families: Vec<Family>,
    unknown: Vec<String>,
    ambiguous: Vec<String>,
}

impl Found {
    /// Adds a layer. Of names of different kinds for one layer the first kind counts, as for diffusers.
    fn add(&mut self, layer: Layer, rank: usize) -> Result<()> {
        let place = (layer.component.clone(), layer.module.clone());
        match self.layers.get(&place) {
            Some((other, earlier)) if *earlier == rank => {
                Err(CatError::adapter(READ, format!("several names stand for the layer `{}`", other.module)))
            }
            Some(_) => Ok(()),
            None => {
                self.layers.insert(place, (layer, rank));
                Ok(())
            }
        }
    }

    /// Adds what a name of kohya or ComfyUI stands for.
    fn add_target(&mut self, name: String, mut targets: Vec<Target>, parts: Parts, rank: usize) -> Result<()> {
        let Some(target) = targets.pop() else {
            self.unknown.push(name);
            return Ok(());
        };
        if !targets.is_empty() {
            self.ambiguous.push(name);
            return Ok(());
        }
        self.families.extend(target.family);
        let mut whole = layer((target.component.to_owned(), name), parts)?;
        // Files of the first versions have no alpha: their scale is 1.
        whole.alpha = Some(whole.alpha.unwrap_or(whole.rank() as f64));
        for part in split(whole, &target.modules)? {
            self.add(part, rank)?;
        }
        Ok(())
    }

    fn adapter(self, format: Format) -> Result<Adapter> {
        refuse_unknown(&self.unknown)?;
        if !self.ambiguous.is_empty() {
            let names: Vec<&str> = self.ambiguous.iter().map(String::as_str).collect();
            return Err(CatError::adapter(
                READ,
                format!("names that fit several layers of the model: {}", listed(&names)),
            ));
        }
        let family = self.families.iter().max_by_key(|family| **family == Family::Flux).copied();
        Ok(Adapter { format, family, layers: self.layers.into_values().map(|(layer, _)| layer).collect() })
    }
}

/// The layers of a joined one: rows of B each. Where every block has columns of B of its own, each gets its share
/// of A; else all have the same A. A block of zeros is a layer that has no LoRA.
fn split(whole: Layer, modules: &[String]) -> Result<Vec<Layer>> {
    if let [module] = modules {
        return Ok(vec![Layer { module: module.clone(), ..whole }]);
    }
    let rows = block_rows(&whole, modules.len())?;
    let blocks = modules.len() as i64;
    let rank = whole.rank();
    let starts: Vec<i64> = rows.iter().scan(0, |end, rows| Some(std::mem::replace(end, *end + rows))).collect();
    let mut own = rank % blocks == 0;
    let share = rank / blocks;
    for (index, (&start, &rows)) in starts.iter().zip(&rows).enumerate() {
        if !own {
            break;
        }
        let block = whole.lora_b.f_narrow(0, start, rows).during(READ)?;
        let first = index as i64 * share;
        let left = block.f_narrow(1, 0, first).during(READ)?;
        let right = block.f_narrow(1, first + share, rank - first - share).during(READ)?;
        own = all_zero(&left)? && all_zero(&right)?;
    }
    let mut layers = Vec::new();
    for (index, module) in modules.iter().enumerate() {
        let mut lora_a = whole.lora_a.shallow_clone();
        let mut lora_b = whole.lora_b.f_narrow(0, starts[index], rows[index]).during(READ)?;
        if own {
            lora_a = lora_a.f_narrow(0, index as i64 * share, share).during(READ)?;
            lora_b = lora_b.f_narrow(1, index as i64 * share, share).during(READ)?;
            if all_zero(&lora_a)? && all_zero(&lora_b)? {
                continue;
            }
        }
        layers.push(Layer {
            component: whole.component.clone(),
            module: module.clone(),
            lora_a: lora_a.f_detach_copy().during(READ)?,
            lora_b: lora_b.f_detach_copy().during(READ)?,
            bias: None,
            magnitude: None,
            alpha: whole.alpha.map(|alpha| if own { alpha / blocks as f64 } else { alpha }),
        });
    }
    Ok(layers)
}

/// Rows of each block: query, key and value are as wide as the input, the rest is the feed-forward layer's.
fn block_rows(whole: &Layer, blocks: usize) -> Result<Vec<i64>> {
    let (rows, width) = (whole.lora_b.size()[0], whole.lora_a.size()[1]);
    let mut sizes = vec![width; 3];
    if blocks > 3 {
        sizes.push(rows - 3 * width);
    }
    if sizes.iter().sum::<i64>() != rows || sizes.iter().any(|&size| size <= 0) {
        let text = format!(
            "`{}` joins {blocks} layers with {width} inputs: expected {} 3 * {width} rows, got {rows}",
            whole.module,
            if blocks > 3 { "more than" } else { "exactly" },
        );
        return Err(CatError::adapter(READ, text));
    }
    Ok(sizes)
}

fn all_zero(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.numel() == 0
        || tensor.f_count_nonzero(None::<i64>).and_then(|n| n.f_int64_value(&[])).during(READ)? == 0)
}

fn to_kohya(layers: &[Layer], family: Family) -> Result<NamedTensors> {
    let names = KohyaNames::new(&KnownModules::new());
    let mut slots: BTreeMap<String, (Slot, BTreeMap<usize, &Layer>)> = BTreeMap::new();
    let mut unknown = Vec::new();
    for layer in layers {
        if layer.bias.is_some() || layer.magnitude.is_some() {
            let what = if layer.bias.is_some() { "a bias of lora_B" } else { "DoRA" };
            let text = format!("kohya's format has no place for {what}, got one at `{}`", layer.module);
            return Err(CatError::adapter(WRITE, text));
        }
        let module = super::names::canonical(&layer.component, &layer.module);
        let Some(slot) = names.slot(family, &layer.component, &module) else {
            unknown.push(format!("{}.{module}", layer.component));
            continue;
        };
        let index = slot.modules.iter().position(|other| *other == module).unwrap_or(0);
        slots.entry(slot.name.clone()).or_insert_with(|| (slot, BTreeMap::new())).1.insert(index, layer);
    }
    if !unknown.is_empty() {
        let names: Vec<&str> = unknown.iter().map(String::as_str).collect();
        let text = format!("kohya has no names for these layers of family {}: {}", family.name(), listed(&names));
        return Err(CatError::adapter(WRITE, text));
    }
    let mut tensors = NamedTensors::new();
    for (name, (slot, layers)) in slots {
        let (down, up, alpha) = match (slot.modules.len(), layers.get(&0)) {
            (1, Some(layer)) => (layer.lora_a.shallow_clone(), layer.lora_b.shallow_clone(), alpha_of(layer)),
            (blocks, _) => join(&name, blocks, &layers)?,
        };
        if !(alpha as f32).is_finite() {
            let text = format!("`{name}.alpha` must be a finite number in float32, got {alpha}");
            return Err(CatError::adapter(WRITE, text));
        }
        let alpha = from_bytes(WRITE, &(alpha as f32).to_ne_bytes(), &[], Kind::Float)?;
        tensors.push((format!("{name}.lora_down.weight"), down));
        tensors.push((format!("{name}.lora_up.weight"), up));
        tensors.push((format!("{name}.alpha"), alpha));
    }
    Ok(tensors)
}

fn alpha_of(layer: &Layer) -> f64 {
    layer.alpha.unwrap_or(layer.rank() as f64)
}

/// One layer that computes what several do: B is block-diagonal, and every block has the largest rank, so that the
/// blocks can be told apart again. Exact where all scales are the same.
fn join(name: &str, blocks: usize, layers: &BTreeMap<usize, &Layer>) -> Result<(Tensor, Tensor, f64)> {
    let Some(first) = layers.values().next() else {
        return Err(CatError::adapter(WRITE, format!("expected layers for `{name}`, got none")));
    };
    let width = first.lora_a.size()[1];
    let rank = layers.values().map(|layer| layer.rank()).max().unwrap_or(0);
    let scale_of = |layer: &Layer| alpha_of(layer) / layer.rank() as f64;
    // Where every scale is 0, any other than 0 leaves the values of B as they are.
    let scale = layers.values().map(|layer| scale_of(layer)).find(|&scale| scale != 0.0);
    let (kind_a, kind_b) = (first.lora_a.f_kind().during(WRITE)?, first.lora_b.f_kind().during(WRITE)?);
    let mut rows = vec![width; 3];
    if blocks > 3 {
        // FLUX's feed-forward layer is four times as wide; an absent layer's rows are zeros.
        rows.push(layers.get(&3).map_or(4 * width, |layer| layer.lora_b.size()[0]));
    }
    let total: i64 = rows.iter().sum();
    let down = Tensor::f_zeros([rank * blocks as i64, width], (kind_a, Device::Cpu)).during(WRITE)?;
    let up = Tensor::f_zeros([total, rank * blocks as i64], (kind_b, Device::Cpu)).during(WRITE)?;
    let mut row = 0;
    for (index, &rows) in rows.iter().enumerate() {
        if let Some(layer) = layers.get(&index) {
            let (a, b) = (layer.lora_a.size(), layer.lora_b.size());
            if a.len() != 2 || a[1] != width || b[0] != rows {
                let text = format!(
                    "`{}` must map {width} to {rows} values to fit `{name}`, got {a:?} and {b:?}",
                    layer.module
                );
                return Err(CatError::adapter(WRITE, text));
            }
            let column = index as i64 * rank;
            let place = |tensor: &Tensor, start, length| tensor.f_narrow(0, start, length).during(WRITE);
            place(&down, column, layer.rank())?.f_copy_(&layer.lora_a).during(WRITE)?;
            let mut block = place(&up, row, rows)?.f_narrow(1, column, layer.rank()).during(WRITE)?;
            block.f_copy_(&layer.lora_b).during(WRITE)?;
            let ratio = scale.map_or(1.0, |scale| scale_of(layer) / scale);
            if ratio != 1.0 {
                let _ = block.f_mul_scalar_(ratio).during(WRITE)?;
            }
        }
        row += rows;
    }
    Ok((down, up, scale.unwrap_or(0.0) * (rank * blocks as i64) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu))
    }

    fn lora(component: &str, module: &str, rank: i64, inputs: i64, outputs: i64, alpha: f64) -> Layer {
        Layer {
            component: component.into(),
            module: module.into(),
            lora_a: random(&[rank, inputs]),
            lora_b: random(&[outputs, rank]),
            bias: None,
            magnitude: None,
            alpha: Some(alpha),
        }
    }

    fn product(layer: &Layer) -> Tensor {
        layer.lora_b.matmul(&layer.lora_a) * (layer.alpha.unwrap() / layer.rank() as f64)
    }

    fn assert_same(left: &[Layer], right: &[Layer]) {
        assert_eq!(left.len(), right.len());
        for (left, right) in left.iter().zip(right) {
            assert_eq!((&left.component, &left.module, left.alpha), (&right.component, &right.module, right.alpha));
            assert!(left.lora_a.equal(&right.lora_a) && left.lora_b.equal(&right.lora_b), "{}", left.module);
        }
    }

    fn read(tensors: NamedTensors) -> Adapter {
        layers_of(READ, tensors, &KnownModules::new()).unwrap()
    }

    #[test]
    fn kohya_round_trip_keeps_every_bit() {
        let mut layers = vec![
            lora("text_encoder", "text_model.encoder.layers.0.mlp.fc1", 4, 6, 8, 1.0),
            lora("unet", "down_blocks.0.attentions.0.proj_in", 3, 6, 6, 3.0),
            lora("unet", "up_blocks.1.resnets.0.conv1", 2, 5, 7, 16.0),
        ];
        layers[2].lora_a = random(&[2, 5, 3, 3]);
        layers[2].lora_b = random(&[7, 2, 1, 1]);
        for family in [Family::Sd, Family::Sdxl] {
            let adapter = read(tensors_of(&layers, Format::Kohya, Some(family)).unwrap());
            assert_eq!((adapter.format, adapter.family), (Format::Kohya, Some(family)));
            assert_same(&adapter.layers, &layers);
        }
        let adapter = read(tensors_of(&layers, Format::Diffusers, None).unwrap());
        assert_eq!(adapter.format, Format::Diffusers);
        for layer in &mut layers {
            layer.alpha = None;
        }
        assert_same(&adapter.layers, &layers);
    }

    #[test]
    fn joined_flux_layers_come_apart_again() {
        let block = "single_transformer_blocks.0";
        let layers = vec![
            lora("transformer", &format!("{block}.attn.to_k"), 2, 6, 6, 8.0),
            lora("transformer", &format!("{block}.attn.to_q"), 2, 6, 6, 8.0),
            lora("transformer", "transformer_blocks.0.attn.to_k", 4, 6, 6, 1.0),
            lora("transformer", "transformer_blocks.0.attn.to_q", 4, 6, 6, 1.0),
            lora("transformer", "transformer_blocks.0.attn.to_v", 4, 6, 6, 1.0),
        ];
        let tensors = tensors_of(&layers, Format::Kohya, Some(Family::Flux)).unwrap();
        let sizes: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.size())).collect();
        assert_eq!(sizes[0], ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", vec![12, 6]));
        assert_eq!(sizes[4], ("lora_unet_single_blocks_0_linear1.lora_up.weight", vec![42, 8]));
        assert_same(&read(tensors).layers, &layers);
    }

    #[test]
    fn joining_different_ranks_and_scales_keeps_the_product() {
        let layers = vec![
            lora("transformer", "transformer_blocks.0.attn.add_k_proj", 2, 6, 6, 1.0),
            lora("transformer", "transformer_blocks.0.attn.add_q_proj", 4, 6, 6, 6.0),
        ];
        let adapter = read(tensors_of(&layers, Format::Kohya, Some(Family::Flux)).unwrap());
        assert_eq!(adapter.layers.len(), 2);
        for (left, right) in adapter.layers.iter().zip(&layers) {
            assert!(product(left).allclose(&product(right), 1e-6, 1e-6, false), "{}", left.module);
        }
    }

    #[test]
    fn a_dense_joined_layer_shares_a() {
        let whole = lora("", "x", 4, 6, 18, 2.0);
        let name = "lora_unet_double_blocks_3_img_attn_qkv";
        let adapter = read(vec![
            (format!("{name}.lora_down.weight"), whole.lora_a.shallow_clone()),
            (format!("{name}.lora_up.weight"), whole.lora_b.shallow_clone()),
            (format!("{name}.alpha"), Tensor::from(2.0f32)),
        ]);
        let modules: Vec<&str> = adapter.layers.iter().map(|layer| layer.module.as_str()).collect();
        assert_eq!(modules, ["k", "q", "v"].map(|name| format!("transformer_blocks.3.attn.to_{name}")));
        let joined = Tensor::cat(&[&adapter.layers[1], &adapter.layers[0], &adapter.layers[2]].map(product), 0);
        assert!(joined.allclose(&product(&whole), 1e-6, 1e-6, false));
    }

    fn pair(name: &str, inputs: i64, outputs: i64) -> NamedTensors {
        vec![
            (format!("{name}.lora_A.weight"), random(&[2, inputs])),
            (format!("{name}.lora_B.weight"), random(&[outputs, 2])),
        ]
    }

    fn places(adapter: &Adapter) -> Vec<String> {
        adapter.layers.iter().map(|layer| format!("{}.{}", layer.component, layer.module)).collect()
    }

    #[test]
    fn comfyui_names_are_read() {
        let cases: [(&str, i64, &[&str], Option<Family>); 8] = [
            ("diffusion_model.layers.0.attention.to_q", 4, &["transformer.layers.0.attention.to_q"], None),
            ("diffusion_model.img_in", 4, &["transformer.img_in"], None),
            (
                "diffusion_model.transformer_blocks.0.attn.to_q",
                4,
                &["transformer.transformer_blocks.0.attn.to_q"],
                None,
            ),
            (
                "diffusion_model.double_blocks.3.img_attn.qkv",
                12,
                &[
                    "transformer.transformer_blocks.3.attn.to_k",
                    "transformer.transformer_blocks.3.attn.to_q",
                    "transformer.transformer_blocks.3.attn.to_v",
                ],
                Some(Family::Flux),
            ),
            (
                "diffusion_model.single_blocks.1.linear2",
                4,
                &["transformer.single_transformer_blocks.1.proj_out"],
                Some(Family::Flux),
            ),
            (
                "diffusion_model.input_blocks.3.0.op",
                4,
                &["unet.down_blocks.0.downsamplers.0.conv"],
                Some(Family::Sdxl),
            ),
            ("diffusion_model.mid_block.resnets.0.conv1", 4, &["unet.mid_block.resnets.0.conv1"], None),
            (
                "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
                4,
                &["text_encoder.text_model.encoder.layers.0.mlp.fc1"],
                None,
            ),
        ];
        for (name, outputs, expected, family) in cases {
            let adapter = read(pair(name, 4, outputs));
            assert_eq!(places(&adapter), expected, "{name}");
            assert_eq!((adapter.format, adapter.family), (Format::Diffusers, family), "{name}");
        }
    }

    #[test]
    fn comfyui_names_follow_the_given_model() {
        let names = |component: &str, modules: &[&str]| {
            KnownModules::from([(component.to_owned(), modules.iter().map(|name| (*name).to_owned()).collect())])
        };
        let tensors = || pair("diffusion_model.blocks.0.self_attn.q", 4, 4);
        let adapter = layers_of("test", tensors(), &names("transformer", &["blocks.0.self_attn.q"])).unwrap();
        assert_eq!(places(&adapter), ["transformer.blocks.0.self_attn.q"]);
        let adapter = layers_of("test", tensors(), &names("unet", &["blocks.0.self_attn.q"])).unwrap();
        assert_eq!(places(&adapter), ["unet.blocks.0.self_attn.q"]);
        let error =
            layers_of("test", tensors(), &names("transformer", &["blocks.0.attn1.to_q"])).unwrap_err().to_string();
        assert!(error.contains("unknown names: `blocks.0.self_attn.q`; what diffusers reads"), "{error}");
    }

    #[test]
    fn names_that_diffusers_changes_are_refused_with_advice() {
        for name in [
            "diffusion_model.blocks.0.self_attn.q",
            "diffusion_model.layers.0.attention.qkv",
            "diffusion_model.blocks.0.ffn.0",
            "diffusion_model.double_blocks.0.img_mlp.fc1",
            "lora_unet_blocks_0_self_attn_q",
            "double_blocks.0.processor.qkv_lora1.down",
        ] {
            let mut tensors = pair(name, 4, 4);
            tensors.extend(pair("diffusion_model.double_blocks.0.img_attn.proj", 4, 4));
            let error = layers_of(READ, tensors, &KnownModules::new()).unwrap_err().to_string();
            assert!(error.contains("pipe.load_lora_weights(file"), "{name}: {error}");
        }
    }

    #[test]
    fn kinds_of_names_may_be_mixed() {
        let mut tensors = pair("transformer.transformer_blocks.0.attn.to_q", 4, 4);
        let expected = tensors[0].1.shallow_clone();
        tensors.extend(pair("lora_unet_double_blocks_0_img_attn_qkv", 4, 12));
        tensors.extend(pair("lora_transformer_proj_out", 4, 4));
        tensors.extend(pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 4, 4));
        tensors.extend(pair("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", 4, 4));
        tensors.extend(pair("transformer_2.blocks.0.attn1.to_q", 4, 4));
        let adapter = read(tensors);
        assert_eq!(
            places(&adapter),
            [
                "text_encoder.text_model.encoder.layers.0.mlp.fc1",
                "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
                "transformer.proj_out",
                "transformer.transformer_blocks.0.attn.to_k",
                "transformer.transformer_blocks.0.attn.to_q",
                "transformer.transformer_blocks.0.attn.to_v",
                "transformer_2.blocks.0.attn1.to_q",
            ]
        );
        assert_eq!((adapter.format, adapter.family), (Format::Kohya, Some(Family::Flux)));
        // The path counts where two kinds of names stand for one layer.
        assert!(adapter.layers[4].lora_a.equal(&expected));
    }

    #[test]
    fn bad_adapters_are_refused_by_name() {
        let a = || random(&[2, 4]);
        let up = || random(&[3, 2]);
        let cases: Vec<(NamedTensors, &str)> = vec![
            (vec![], "expected tensors of a LoRA, got none"),
            (vec![("x.weight".into(), a())], "unknown names: `x.weight`"),
            (vec![("unet.x.lora_A.weight".into(), a())], "`x` must have both matrices"),
            (
                vec![("unet.x.lora_A.weight".into(), a()), ("unet.x.lora_B.weight".into(), random(&[3, 5]))],
                "`unet.x.lora_A.weight` must be [r, ...] and `unet.x.lora_B.weight` [out, r, ...] with r >= 1, got [2, 4] and [3, 5]",
            ),
            (
                vec![("unet.x.lora_A.weight".into(), a()), ("unet.x.lora_B.weight".into(), up().to_kind(Kind::Int64))],
                "`unet.x.lora_B.weight` must have dtype float32, float64, bfloat16 or float16, got int64",
            ),
            (
                vec![("unet.x.lora_A.weight".into(), a()), ("unet.x.lora.down.weight".into(), a())],
                "are the same tensor of a layer",
            ),
            (
                vec![
                    ("unet.x.lora_A.weight".into(), a()),
                    ("unet.x.lora_B.weight".into(), up()),
                    ("unet.x.alpha".into(), a()),
                ],
                "`unet.x.alpha` must be one number, got shape [2, 4]",
            ),
            (
                vec![("lora_unet_nowhere.lora_down.weight".into(), a()), ("lora_unet_nowhere.lora_up.weight".into(), up())],
                "unknown names: `lora_unet_nowhere`",
            ),
            (
                vec![("lora_unet_conv_in.lora_down.weight".into(), a()), ("lora_unet_conv_in.dora_scale".into(), up())],
                "DoRA in kohya's format is not supported",
            ),
            (
                vec![
                    ("lora_unet_single_blocks_0_linear1.lora_down.weight".into(), a()),
                    ("lora_unet_single_blocks_0_linear1.lora_up.weight".into(), random(&[12, 2])),
                ],
                "expected more than 3 * 4 rows, got 12",
            ),
            (
                vec![
                    ("unet.x.lora_A.weight".into(), a()),
                    ("unet.x.lora_B.weight".into(), up()),
                    ("y.lora_A.weight".into(), a()),
                    ("y.lora_B.weight".into(), up()),
                ],
                "expected names that start with one of unet, transformer, transformer_2, text_encoder, text_encoder_2, text_encoder_3, got `y`",
            ),
        ];
        for (tensors, expected) in cases {
            let error = layers_of(READ, tensors, &KnownModules::new()).unwrap_err();
            assert!(matches!(error, CatError::Adapter { .. }), "{error:?}");
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn what_kohya_cannot_hold_is_refused() {
        let mut layer = lora("unet", "conv_in", 2, 3, 4, 2.0);
        let error = |layers: &[Layer], family| tensors_of(layers, Format::Kohya, family).unwrap_err().to_string();
        assert!(error(std::slice::from_ref(&layer), None).contains("`family` must be sd, sdxl or flux"));
        assert!(error(std::slice::from_ref(&layer), Some(Family::Flux))
            .contains("no names for these layers of family flux: `unet.conv_in`"));
        assert!(error(&[], Some(Family::Sd)).contains("got none"));
        layer.magnitude = Some(random(&[4]));
        assert!(error(std::slice::from_ref(&layer), Some(Family::Sd)).contains("no place for DoRA"));
    }
}
