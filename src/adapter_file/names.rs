//! What the formats call a layer, and how one name is found from another.
//!
//! kohya writes a module's path with `_` for `.`, which alone cannot be undone: names are resolved against the
//! structure of the families' models, and against the model's own module names where they are given.

use std::collections::{BTreeMap, BTreeSet};

use super::{Family, KnownModules};

/// The components whose layers a file may hold.
pub const COMPONENTS: [&str; 6] =
    ["unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"];
/// What `parse_dotted` calls the component of ComfyUI's `diffusion_model.`, which is any denoiser.
pub const ANY_DENOISER: &str = "diffusion_model";
/// How ComfyUI's names start: its words for a component, and ours.
const COMFY_PREFIXES: [(&str, &str); 3] = [
    ("diffusion_model.", ANY_DENOISER),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
];

/// What a tensor is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A
    A,
    /// B
    B,
    /// The bias of B.
    Bias,
    /// DoRA's magnitude.
    Magnitude,
    /// The numerator of the scale.
    Alpha,
}

/// How diffusers, by its versions, PEFT and trainers with kohya's words call the parts.
const DOTTED_PARTS: [(&str, Part); 16] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_A.default.weight", Part::A),
    (".lora_B.default.weight", Part::B),
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".lora_B.bias", Part::Bias),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".lora_linear_layer.down.weight", Part::A),
    (".lora_linear_layer.up.weight", Part::B),
    (".lora_linear_layer.up.bias", Part::Bias),
    (".lora.down.weight", Part::A),
    (".lora.up.weight", Part::B),
    (".lora.up.bias", Part::Bias),
    (".alpha", Part::Alpha),
];
const KOHYA_PARTS: [(&str, Part); 5] = [
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".alpha", Part::Alpha),
];
/// How the names of denoisers start that the tables below know.
const TABLED_BLOCKS: [&str; 8] = [
    "double_blocks.",
    "single_blocks.",
    "input_blocks.",
    "middle_block.",
    "output_blocks.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
];
/// Parts of names that models have in their authors' code and not in diffusers: Wan, Lumina, Z-Image, Cosmos ...
const AUTHORS_PARTS: [&str; 6] = ["qkv", "self_attn", "cross_attn", "attention.out", "ffn.0", "ffn.2"];
/// The first layout of diffusers: attention processors with a LoRA of their own.
const PROCESSOR_LAYERS: [(&str, &str, &str); 4] = [
    ("to_q_lora", "to_q", "q_proj"),
    ("to_k_lora", "to_k", "k_proj"),
    ("to_v_lora", "to_v", "v_proj"),
    ("to_out_lora", "to_out.0", "out_proj"),
];
const PEFT_PREFIX: &str = "base_model.model.";

/// A tensor's name, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    /// Empty where the name does not tell.
    pub component: String,
    /// The module's path, or kohya's name of it.
    pub module: String,
    /// What the tensor is.
    pub part: Part,
}

/// Takes a name of diffusers or PEFT apart.
pub fn parse_dotted(key: &str) -> Option<Key> {
    let rest = key.strip_prefix(PEFT_PREFIX).unwrap_or(key);
    let comfy = COMFY_PREFIXES.iter().find_map(|(prefix, component)| Some((*component, rest.strip_prefix(prefix)?)));
    let (component, rest) = comfy.unwrap_or_else(|| match rest.split_once('.') {
        Some((first, rest)) if COMPONENTS.contains(&first) => (first, rest),
        _ => ("", rest),
    });
    let (module, part) = split_part(rest, &DOTTED_PARTS).or_else(|| split_processor_part(rest))?;
    let module = module.replace(".processor.", ".");
    let module = processor_layer(component, &module).unwrap_or(module);
    (!module.is_empty()).then(|| Key { component: component.into(), module, part })
}

/// Whether a name is one of kohya's, whatever it stands for.
pub fn is_kohya(key: &str) -> bool {
    key.starts_with("lora_")
}

/// Takes a name of kohya apart; the component stays empty.
pub fn parse_kohya(key: &str) -> Option<Key> {
    let (name, part) = split_part(key, &KOHYA_PARTS)?;
    Some(Key { component: String::new(), module: name.into(), part })
}

/// Whether the tables know how the denoiser with this module calls its blocks.
pub fn is_tabled(module: &str) -> bool {
    TABLED_BLOCKS.iter().any(|block| module.starts_with(block))
}

/// Whether a module has a name that diffusers changes.
pub fn is_authors_name(module: &str) -> bool {
    let path = format!(".{module}.");
    AUTHORS_PARTS.iter().any(|part| path.contains(&format!(".{part}.")))
}

fn split_part<'a>(key: &'a str, parts: &[(&str, Part)]) -> Option<(&'a str, Part)> {
    parts.iter().find_map(|(suffix, part)| Some((key.strip_suffix(suffix)?, *part)))
}

fn split_processor_part(key: &str) -> Option<(&str, Part)> {
    let parts = [(".down.weight", Part::A), (".up.weight", Part::B)];
    split_part(key, &parts).filter(|(module, _)| module.ends_with("_lora"))
}

fn processor_layer(component: &str, module: &str) -> Option<String> {
    PROCESSOR_LAYERS.iter().find_map(|(old, denoiser, encoder)| {
        let parent = module.strip_suffix(old)?;
        let layer = if component.starts_with("text_encoder") { encoder } else { denoiser };
        parent.ends_with('.').then(|| format!("{parent}{layer}"))
    })
}

/// The name that diffusers reads.
pub fn diffusers_key(component: &str, module: &str, part: Part) -> String {
    // Of text encoders, diffusers' loader recognizes this naming only.
    let encoder = component.starts_with("text_encoder");
    let suffix = match part {
        Part::A if encoder => ".lora_linear_layer.down.weight",
        Part::B if encoder => ".lora_linear_layer.up.weight",
        Part::Bias if encoder => ".lora_linear_layer.up.bias",
        _ => dotted_suffix(part),
    };
    format!("{component}.{}{suffix}", canonical(component, module))
}

/// The name that PEFT reads.
pub fn peft_key(module: &str, part: Part) -> String {
    format!("{PEFT_PREFIX}{module}{}", dotted_suffix(part))
}

fn dotted_suffix(part: Part) -> &'static str {
    match part {
        Part::A => ".lora_A.weight",
        Part::B => ".lora_B.weight",
        Part::Bias => ".lora_B.bias",
        Part::Magnitude => ".lora_magnitude_vector",
        Part::Alpha => ".alpha",
    }
}

/// A module's name as files have it: newer versions of transformers leave CLIP's `text_model.` away in the model.
pub fn canonical(component: &str, module: &str) -> String {
    if component.starts_with("text_encoder") && module.starts_with("encoder.layers.") {
        format!("text_model.{module}")
    } else {
        module.to_owned()
    }
}

/// One name of kohya and the module, or the modules joined in it; `{}` stands for a number.
#[derive(Debug)]
struct Entry {
    kohya: String,
    modules: Vec<String>,
    /// The family whose files alone have the name.
    family: Option<Family>,
}

/// Where a layer stands in a kohya file.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    /// The whole name, with its prefix.
    pub name: String,
    /// All modules that are joined under the name, in order.
    pub modules: Vec<String>,
}

/// What a kohya name means.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    /// The component.
    pub component: &'static str,
    /// The module, or those joined under the name.
    pub modules: Vec<String>,
    /// The family, where the name tells.
    pub family: Option<Family>,
}

/// kohya's names of the families' layers.
#[derive(Debug)]
pub struct KohyaNames {
    /// (prefix, component, entries)
    tables: Vec<(&'static str, &'static str, Vec<Entry>)>,
    /// (prefix, flattened name) to the modules of a given model.
    known: BTreeMap<(&'static str, String), BTreeSet<(&'static str, String)>>,
    /// The components whose modules are known.
    components: BTreeSet<&'static str>,
    modules: BTreeSet<(&'static str, String)>,
}

impl KohyaNames {
    /// The names, checked against a model's modules where these are given.
    pub fn new(known: &KnownModules) -> Self {
        let tables = vec![
            ("lora_unet_", "unet", [ldm_unet(), unet()].into_iter().flatten().collect()),
            ("lora_unet_", "transformer", flux()),
            ("lora_transformer_", "transformer", flux_by_path()),
            ("lora_te_", "text_encoder", clip(Some(Family::Sd))),
            ("lora_te1_", "text_encoder", clip(None)),
            ("lora_te2_", "text_encoder_2", clip(Some(Family::Sdxl))),
            ("lora_te3_", "text_encoder_2", t5()),
        ];
        let mut names = Self { tables, known: BTreeMap::new(), components: BTreeSet::new(), modules: BTreeSet::new() };
        for component in COMPONENTS {
            for module in known.get(component).into_iter().flatten() {
                names.add_known(component, &canonical(component, module));
            }
        }
        names
    }

    fn add_known(&mut self, component: &'static str, module: &str) {
        self.components.insert(component);
        self.modules.insert((component, module.to_owned()));
        let prefixes: &[&'static str] = match component {
            "unet" => &["lora_unet_"],
            "transformer" => &["lora_unet_", "lora_transformer_"],
            "text_encoder" => &["lora_te_", "lora_te1_"],
            "text_encoder_2" => &["lora_te2_", "lora_te3_"],
            _ => &[],
        };
        for prefix in prefixes {
            let flat = module.replace('.', "_");
            self.known.entry((prefix, flat)).or_default().insert((component, module.to_owned()));
        }
    }

    /// What ComfyUI's name of a denoiser's module means; as `resolve`.
    pub fn resolve_denoiser(&self, module: &str, tabled: bool) -> Vec<Target> {
        let own = |component: &'static str| Target { component, modules: vec![module.to_owned()], family: None };
        let given: Vec<&'static str> =
            ["unet", "transformer"].into_iter().filter(|component| self.components.contains(component)).collect();
        let exact = given.iter().find(|component| self.modules.contains(&(**component, module.to_owned())));
        match exact {
            Some(component) => vec![own(component)],
            None if tabled || !given.is_empty() => self.resolve(&format!("lora_unet_{}", module.replace('.', "_"))),
            None if is_authors_name(module) => Vec::new(),
            None => vec![own("transformer")],
        }
    }

    /// What a name means; several answers where it is ambiguous, none where nothing fits.
    pub fn resolve(&self, name: &str) -> Vec<Target> {
        let mut targets: Vec<Target> = Vec::new();
        for (prefix, component, entries) in &self.tables {
            let Some(flat) = name.strip_prefix(prefix) else { continue };
            for entry in entries {
                let Some(numbers) = captures(&entry.kohya, flat) else { continue };
                let modules: Vec<String> = entry.modules.iter().map(|module| fill(module, &numbers)).collect();
                let missing = |module: &String| !self.modules.contains(&(*component, module.clone()));
                // Of joined layers some may be absent from an adapter, none from the model.
                if self.components.contains(component) && modules.iter().any(missing) {
                    continue;
                }
                targets.push(Target { component, modules, family: entry.family });
            }
        }
        let prefixes: BTreeSet<&'static str> = self.tables.iter().map(|(prefix, ..)| *prefix).collect();
        for prefix in prefixes {
            let Some(flat) = name.strip_prefix(prefix) else { continue };
            for (component, module) in self.known.get(&(prefix, flat.to_owned())).into_iter().flatten() {
                targets.push(Target { component, modules: vec![module.clone()], family: None });
            }
        }
        let mut seen = BTreeSet::new();
        targets.retain(|target| seen.insert((target.component, target.modules.clone())));
        targets
    }

    /// Where kohya's trainer writes a layer of the family; `None` where it has no name for it.
    pub fn slot(&self, family: Family, component: &str, module: &str) -> Option<Slot> {
        let prefix = match (family, component) {
            (Family::Sd | Family::Sdxl, "unet") | (Family::Flux, "transformer") => "lora_unet_",
            (Family::Sd, "text_encoder") => "lora_te_",
            (Family::Sdxl | Family::Flux, "text_encoder") => "lora_te1_",
            (Family::Sdxl, "text_encoder_2") => "lora_te2_",
            (Family::Flux, "text_encoder_2") => "lora_te3_",
            _ => return None,
        };
        let module = canonical(component, module);
        let (_, _, entries) = self.tables.iter().find(|(p, c, _)| *p == prefix && *c == component)?;
        // kohya's SDXL trainer has LDM's U-Net, the others have that of diffusers.
        let ldm = (family, component) == (Family::Sdxl, "unet");
        entries.iter().filter(|entry| component != "unet" || entry.family.is_some() == ldm).find_map(|entry| {
            let numbers = entry.modules.iter().find_map(|template| captures(template, &module))?;
            Some(Slot {
                name: format!("{prefix}{}", fill(&entry.kohya, &numbers)),
                modules: entry.modules.iter().map(|template| fill(template, &numbers)).collect(),
            })
        })
    }
}

/// The numbers that stand for the `{}` of a template, if `text` fits it.
fn captures<'a>(template: &str, text: &'a str) -> Option<Vec<&'a str>> {
    let mut pieces = template.split("{}");
    let mut rest = text.strip_prefix(pieces.next()?)?;
    let mut numbers = Vec::new();
    for piece in pieces {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        if number.is_empty() {
            return None;
        }
        numbers.push(number);
        rest = after.strip_prefix(piece)?;
    }
    rest.is_empty().then_some(numbers)
}

fn fill(template: &str, numbers: &[&str]) -> String {
    let mut pieces = template.split("{}");
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for (piece, number) in pieces.zip(numbers) {
        text.push_str(number);
        text.push_str(piece);
    }
    text
}

/// A module that kohya calls by its path.
fn by_path(module: impl Into<String>, family: Option<Family>) -> Entry {
    let module = module.into();
    Entry { kohya: module.replace('.', "_"), modules: vec![module], family }
}

const ATTENTION_LAYERS: [&str; 12] = [
    "proj_in",
    "proj_out",
    "transformer_blocks.{}.attn1.to_q",
    "transformer_blocks.{}.attn1.to_k",
    "transformer_blocks.{}.attn1.to_v",
    "transformer_blocks.{}.attn1.to_out.0",
    "transformer_blocks.{}.attn2.to_q",
    "transformer_blocks.{}.attn2.to_k",
    "transformer_blocks.{}.attn2.to_v",
    "transformer_blocks.{}.attn2.to_out.0",
    "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2",
];
/// Layers of a residual block: diffusers' name, LDM's name.
const RESNET_LAYERS: [(&str, &str); 4] = [
    ("conv1", "in_layers_2"),
    ("time_emb_proj", "emb_layers_1"),
    ("conv2", "out_layers_3"),
    ("conv_shortcut", "skip_connection"),
];
/// Layers outside the blocks: diffusers' name, LDM's name.
const OUTER_LAYERS: [(&str, &str); 6] = [
    ("conv_in", "input_blocks_0_0"),
    ("conv_out", "out_2"),
    ("time_embedding.linear_1", "time_embed_0"),
    ("time_embedding.linear_2", "time_embed_2"),
    ("add_embedding.linear_1", "label_emb_0_0"),
    ("add_embedding.linear_2", "label_emb_0_2"),
];

/// diffusers' U-Net by the paths of its modules.
fn unet() -> Vec<Entry> {
    let mut modules: Vec<String> = OUTER_LAYERS.iter().map(|(module, _)| (*module).to_owned()).collect();
    for block in ["down_blocks.{}", "mid_block", "up_blocks.{}"] {
        modules.extend(ATTENTION_LAYERS.iter().map(|layer| format!("{block}.attentions.{{}}.{layer}")));
        modules.extend(RESNET_LAYERS.iter().map(|(layer, _)| format!("{block}.resnets.{{}}.{layer}")));
    }
    modules.extend(["down_blocks.{}.downsamplers.{}.conv".to_owned(), "up_blocks.{}.upsamplers.{}.conv".to_owned()]);
    modules.into_iter().map(|module| by_path(module, None)).collect()
}

/// SDXL's U-Net in the naming of LDM: three levels, two layers each on the way down and three on the way up.
fn ldm_unet() -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut add = |kohya: String, module: String| {
        entries.push(Entry { kohya, modules: vec![module], family: Some(Family::Sdxl) });
    };
    let mut resnets = vec![("middle_block_0".to_owned(), "mid_block.resnets.0".to_owned())];
    resnets.push(("middle_block_2".to_owned(), "mid_block.resnets.1".to_owned()));
    let mut attentions = vec![("middle_block_1".to_owned(), "mid_block.attentions.0".to_owned())];
    for level in 0..3 {
        for layer in 0..2 {
            let block = format!("input_blocks_{}", 3 * level + layer + 1);
            resnets.push((format!("{block}_0"), format!("down_blocks.{level}.resnets.{layer}")));
            attentions.push((format!("{block}_1"), format!("down_blocks.{level}.attentions.{layer}")));
        }
        for layer in 0..3 {
            let block = format!("output_blocks_{}", 3 * level + layer);
            resnets.push((format!("{block}_0"), format!("up_blocks.{level}.resnets.{layer}")));
            attentions.push((format!("{block}_1"), format!("up_blocks.{level}.attentions.{layer}")));
        }
    }
    for level in 0..2 {
        add(format!("input_blocks_{}_0_op", 3 * level + 3), format!("down_blocks.{level}.downsamplers.0.conv"));
        add(format!("output_blocks_{}_2_conv", 3 * level + 2), format!("up_blocks.{level}.upsamplers.0.conv"));
    }
    for (kohya, module) in resnets {
        for (layer, name) in RESNET_LAYERS {
            add(format!("{kohya}_{name}"), format!("{module}.{layer}"));
        }
    }
    for (kohya, module) in attentions {
        for layer in ATTENTION_LAYERS {
            add(format!("{kohya}_{}", layer.replace('.', "_")), format!("{module}.{layer}"));
        }
    }
    for (module, name) in OUTER_LAYERS {
        add(name.to_owned(), module.to_owned());
    }
    entries
}

/// CLIP's text encoder.
fn clip(family: Option<Family>) -> Vec<Entry> {
    let layers =
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"];
    let mut modules: Vec<String> =
        layers.iter().map(|layer| format!("text_model.encoder.layers.{{}}.{layer}")).collect();
    modules.push("text_projection".to_owned());
    modules.into_iter().map(|module| by_path(module, family)).collect()
}

/// T5's encoder.
fn t5() -> Vec<Entry> {
    let attention = ["q", "k", "v", "o"].map(|layer| format!("encoder.block.{{}}.layer.0.SelfAttention.{layer}"));
    let feed = ["wi_0", "wi_1", "wo"].map(|layer| format!("encoder.block.{{}}.layer.1.DenseReluDense.{layer}"));
    attention.into_iter().chain(feed).map(|module| by_path(module, Some(Family::Flux))).collect()
}

/// FLUX in the naming of its authors, where query, key and value are one layer.
fn flux() -> Vec<Entry> {
    let double = "transformer_blocks.{}";
    let single = "single_transformer_blocks.{}";
    let embedder = "time_text_embed";
    let table: [(&str, &str, &[&str]); 21] = [
        ("double_blocks_{}_img_attn_qkv", double, &["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("double_blocks_{}_txt_attn_qkv", double, &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        ("double_blocks_{}_img_attn_proj", double, &["attn.to_out.0"]),
        ("double_blocks_{}_txt_attn_proj", double, &["attn.to_add_out"]),
        ("double_blocks_{}_img_mlp_0", double, &["ff.net.0.proj"]),
        ("double_blocks_{}_img_mlp_2", double, &["ff.net.2"]),
        ("double_blocks_{}_txt_mlp_0", double, &["ff_context.net.0.proj"]),
        ("double_blocks_{}_txt_mlp_2", double, &["ff_context.net.2"]),
        ("double_blocks_{}_img_mod_lin", double, &["norm1.linear"]),
        ("double_blocks_{}_txt_mod_lin", double, &["norm1_context.linear"]),
        ("single_blocks_{}_linear1", single, &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
        ("single_blocks_{}_linear2", single, &["proj_out"]),
        ("single_blocks_{}_modulation_lin", single, &["norm.linear"]),
        ("img_in", "", &["x_embedder"]),
        ("txt_in", "", &["context_embedder"]),
        ("time_in_in_layer", embedder, &["timestep_embedder.linear_1"]),
        ("time_in_out_layer", embedder, &["timestep_embedder.linear_2"]),
        ("vector_in_in_layer", embedder, &["text_embedder.linear_1"]),
        ("vector_in_out_layer", embedder, &["text_embedder.linear_2"]),
        ("guidance_in_in_layer", embedder, &["guidance_embedder.linear_1"]),
        ("guidance_in_out_layer", embedder, &["guidance_embedder.linear_2"]),
    ];
    let path = |parent: &str, layer: &str| if parent.is_empty() { layer.into() } else { format!("{parent}.{layer}") };
    let entry = |(kohya, parent, layers): (&str, &str, &[&str])| Entry {
        kohya: kohya.to_owned(),
        modules: layers.iter().map(|layer| path(parent, layer)).collect(),
        family: Some(Family::Flux),
    };
    table.into_iter().map(entry).collect()
}

/// FLUX by the paths of diffusers' modules, as some trainers write it.
fn flux_by_path() -> Vec<Entry> {
    let modules = flux().into_iter().flat_map(|entry| entry.modules);
    let last = ["norm_out.linear", "proj_out"].map(str::to_owned);
    modules.chain(last).map(|module| by_path(module, Some(Family::Flux))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(component: &str, module: &str, part: Part) -> Option<Key> {
        Some(Key { component: component.into(), module: module.into(), part })
    }

    #[test]
    fn dotted_names_of_every_version_are_read() {
        let q = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q";
        let te = "text_model.encoder.layers.3.self_attn.out_proj";
        for (name, expected) in [
            (format!("unet.{q}.lora_A.weight"), key("unet", q, Part::A)),
            (format!("unet.{q}.lora.up.weight"), key("unet", q, Part::B)),
            (format!("unet.{q}.lora_B.bias"), key("unet", q, Part::Bias)),
            (format!("unet.{q}.alpha"), key("unet", q, Part::Alpha)),
            (format!("unet.{q}.lora_magnitude_vector"), key("unet", q, Part::Magnitude)),
            (format!("base_model.model.{q}.lora_B.weight"), key("", q, Part::B)),
            (format!("{q}.lora_B.weight"), key("", q, Part::B)),
            (format!("text_encoder_2.{te}.lora_linear_layer.down.weight"), key("text_encoder_2", te, Part::A)),
            (format!("transformer.{q}.lora_down.weight"), key("transformer", q, Part::A)),
            (format!("transformer_2.{q}.lora_up.weight"), key("transformer_2", q, Part::B)),
            (format!("text_encoder_3.{te}.lora_A.default.weight"), key("text_encoder_3", te, Part::A)),
            (format!("diffusion_model.{q}.lora_B.weight"), key(ANY_DENOISER, q, Part::B)),
            (format!("base_model.model.diffusion_model.{q}.alpha"), key(ANY_DENOISER, q, Part::Alpha)),
            (format!("text_encoders.clip_l.transformer.{te}.lora_up.weight"), key("text_encoder", te, Part::B)),
            (format!("text_encoders.clip_g.transformer.{te}.lora_up.weight"), key("text_encoder_2", te, Part::B)),
            (
                "unet.mid_block.attn1.processor.to_out_lora.up.weight".into(),
                key("unet", "mid_block.attn1.to_out.0", Part::B),
            ),
            (
                "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.up.weight".into(),
                key("text_encoder", te, Part::B),
            ),
            (format!("unet.{q}.weight"), None),
            (format!("unet.{q}.hada_w1_a"), None),
            ("unet.lora_A.weight".into(), None),
        ] {
            assert_eq!(parse_dotted(&name), expected, "{name}");
        }
    }

    #[test]
    fn kohya_names_are_known() {
        let names = KohyaNames::new(&KnownModules::new());
        let unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0";
        let te = "text_model.encoder.layers.11.mlp.fc1";
        for (family, component, module, expected) in [
            (Family::Sd, "unet", unet, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"),
            (Family::Sdxl, "unet", unet, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"),
            (Family::Sdxl, "unet", "down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
            (Family::Sdxl, "unet", "up_blocks.1.upsamplers.0.conv", "lora_unet_output_blocks_5_2_conv"),
            (
                Family::Sdxl,
                "unet",
                "up_blocks.2.resnets.2.conv_shortcut",
                "lora_unet_output_blocks_8_0_skip_connection",
            ),
            (Family::Sdxl, "unet", "mid_block.resnets.1.time_emb_proj", "lora_unet_middle_block_2_emb_layers_1"),
            (Family::Sdxl, "unet", "add_embedding.linear_2", "lora_unet_label_emb_0_2"),
            (Family::Sd, "unet", "time_embedding.linear_1", "lora_unet_time_embedding_linear_1"),
            (Family::Sd, "text_encoder", te, "lora_te_text_model_encoder_layers_11_mlp_fc1"),
            (Family::Sd, "text_encoder", "encoder.layers.11.mlp.fc1", "lora_te_text_model_encoder_layers_11_mlp_fc1"),
            (Family::Sdxl, "text_encoder", te, "lora_te1_text_model_encoder_layers_11_mlp_fc1"),
            (Family::Sdxl, "text_encoder_2", te, "lora_te2_text_model_encoder_layers_11_mlp_fc1"),
            (Family::Flux, "text_encoder", te, "lora_te1_text_model_encoder_layers_11_mlp_fc1"),
            (
                Family::Flux,
                "transformer",
                "transformer_blocks.7.attn.add_k_proj",
                "lora_unet_double_blocks_7_txt_attn_qkv",
            ),
            (
                Family::Flux,
                "transformer",
                "single_transformer_blocks.37.proj_mlp",
                "lora_unet_single_blocks_37_linear1",
            ),
            (
                Family::Flux,
                "text_encoder_2",
                "encoder.block.0.layer.1.DenseReluDense.wi_0",
                "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0",
            ),
        ] {
            let slot = names.slot(family, component, module).expect(module);
            assert_eq!(slot.name, expected);
            let targets = names.resolve(expected);
            assert_eq!(targets.len(), 1, "{expected}: {targets:?}");
            assert_eq!((targets[0].component, &targets[0].modules), (component, &slot.modules));
            assert!(slot.modules.contains(&canonical(component, module)));
        }
        assert_eq!(names.slot(Family::Sdxl, "unet", "down_blocks.1.resnets.2.conv1"), None);
        assert_eq!(names.slot(Family::Sd, "transformer", "transformer_blocks.0.attn.to_q"), None);
        assert!(names.resolve("lora_unet_input_blocks_12_0_op").is_empty());
        assert!(names.resolve("lora_unet_down_blocks__attentions_0_proj_in").is_empty());
    }

    #[test]
    fn every_name_in_the_tables_has_one_meaning() {
        let names = KohyaNames::new(&KnownModules::new());
        for (prefix, _, entries) in &names.tables {
            for entry in entries {
                let name = format!("{prefix}{}", fill(&entry.kohya, &["1", "0", "2"]));
                assert_eq!(names.resolve(&name).len(), 1, "{name}: {:?}", names.resolve(&name));
            }
        }
    }

    #[test]
    fn a_models_own_modules_decide() {
        let modules = ["blocks.0.to_q", "a.b_c", "a_b.c", "down_blocks.0.resnets.0.conv1"].map(String::from).to_vec();
        let names = KohyaNames::new(&KnownModules::from([("unet".to_owned(), modules)]));
        let meaning = |name: &str| names.resolve(name).into_iter().map(|target| target.modules).collect::<Vec<_>>();
        assert_eq!(meaning("lora_unet_blocks_0_to_q"), [["blocks.0.to_q"]]);
        assert_eq!(meaning("lora_unet_a_b_c"), [["a.b_c"], ["a_b.c"]]);
        assert_eq!(meaning("lora_unet_input_blocks_1_0_in_layers_2"), [["down_blocks.0.resnets.0.conv1"]]);
        assert!(meaning("lora_unet_down_blocks_0_resnets_1_conv1").is_empty());
        assert!(meaning("lora_unet_blocks_1_to_q").is_empty());
    }
}
