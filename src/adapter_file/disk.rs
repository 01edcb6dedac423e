//! Safetensors files: read whole, written as their tensors come.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use tch::{Kind, Tensor};

use super::{check_named, Metadata, NamedTensors};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{bytes, contiguous, dtype_name, from_bytes};

const READ: &str = "load_lora";
const WRITE: &str = "write_safetensors";
/// The dtypes that are read and written, as both sides name them.
const DTYPES: [(Dtype, Kind); 9] = [
    (Dtype::F64, Kind::Double),
    (Dtype::F32, Kind::Float),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
];
const DTYPE_NAMES: &str = "float64, float32, float16, bfloat16 or integers";
/// Bytes of the header's length, at the start of the file.
const LENGTH_BYTES: u64 = 8;
/// The longest header that safetensors reads.
const LONGEST_HEADER: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// Reads every tensor and the metadata of a safetensors file.
pub fn read(path: &Path) -> Result<(NamedTensors, Metadata)> {
    let bytes = read_bytes(path)?;
    let damaged = |error: SafeTensorError| not_safetensors(path, &reason(&error));
    let (length, header) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
    let text = &bytes[LENGTH_BYTES as usize..][..length];
    let once = NamesOnce.deserialize(&mut serde_json::Deserializer::from_slice(text));
    once.map_err(|error| damaged(SafeTensorError::InvalidHeaderDeserialization(error)))?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let file = SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let mut tensors = Vec::with_capacity(file.len());
    for (name, view) in file.iter() {
        let Some((_, kind)) = DTYPES.iter().find(|(dtype, _)| *dtype == view.dtype()) else {
            let text = format!("{}: `{name}` must have dtype {DTYPE_NAMES}, got {:?}", path.display(), view.dtype());
            return Err(CatError::adapter(READ, text));
        };
        let size =
            view.shape().iter().map(|&length| i64::try_from(length)).collect::<std::result::Result<Vec<_>, _>>();
        let size = size.map_err(|_| not_safetensors(path, &format!("`{name}` has a size beyond 2^63")))?;
        tensors.push((name.to_owned(), from_bytes(READ, view.data(), &size, *kind)?));
    }
    tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok((tensors, metadata))
}

/// A tensor to write.
pub enum Source {
    /// One that is there.
    Whole(Tensor),
    /// One that comes in parts, each a piece of its memory: they need not fit into memory together.
    Parts {
        /// PyTorch's name of the dtype.
        dtype: String,
        /// The shape of the whole.
        shape: Vec<usize>,
        /// What is asked for the parts when their turn comes.
        parts: Box<dyn Iterator<Item = Tensor> + Send>,
    },
}

/// Writes a safetensors file into an open file, `path` in errors: the header, then each tensor's bytes.
///
/// The same tensors and metadata give the same bytes.
pub fn write(file: File, path: &Path, tensors: Vec<(String, Source)>, metadata: Metadata) -> Result<()> {
    if tensors.is_empty() {
        return Err(CatError::adapter(WRITE, format!("{}: expected tensors to write, got none", path.display())));
    }
    let mut entries = tensors
        .into_iter()
        .map(|(name, source)| {
            let info = information(&name, &source)?;
            Ok((name, source, info))
        })
        .collect::<Result<Vec<_>>>()?;
    // As safetensors does: the widest first, so that all are aligned.
    entries.sort_by(|(left, _, info), (right, _, other)| other.dtype.cmp(&info.dtype).then_with(|| left.cmp(right)));
    let mut end = 0;
    for (_, _, info) in &mut entries {
        let (start, size) = (end, info.data_offsets.1);
        end += size;
        info.data_offsets = (start, end);
    }
    let failed = |source: io::Error| CatError::io(WRITE, path, source);
    let mut file = BufWriter::new(file);
    file.write_all(&header(&entries, metadata)?).map_err(failed)?;
    for (name, source, info) in entries {
        let (mut written, expected) = (0, info.data_offsets.1 - info.data_offsets.0);
        let parts: Box<dyn Iterator<Item = Tensor>> = match source {
            Source::Whole(tensor) => Box::new(std::iter::once(tensor)),
            Source::Parts { parts, .. } => parts,
        };
        for part in parts {
            check_named(WRITE, &name, &part)?;
            let dtype = dtype_of(WRITE, &name, &part)?;
            if dtype != info.dtype {
                let text = format!("`{name}` must come in parts of dtype {:?}, got {dtype:?}", info.dtype);
                return Err(CatError::adapter(WRITE, text));
            }
            let part = contiguous(WRITE, &part)?;
            let data = bytes(WRITE, &part)?;
            written += data.len();
            file.write_all(data).map_err(failed)?;
        }
        if written != expected {
            let text = format!("`{name}` must come in parts of {expected} bytes together, got {written}");
            return Err(CatError::adapter(WRITE, text));
        }
    }
    file.flush().map_err(failed)
}

/// Dtype, shape and, in place of the offsets, size.
fn information(name: &str, source: &Source) -> Result<TensorInfo> {
    let (dtype, shape) = match source {
        Source::Whole(tensor) => {
            check_named(WRITE, name, tensor)?;
            let shape = tensor.size().iter().map(|&length| usize::try_from(length).unwrap_or(0)).collect();
            (dtype_of(WRITE, name, tensor)?, shape)
        }
        Source::Parts { dtype, shape, .. } => {
            let known = DTYPES.iter().find(|(_, kind)| dtype_name(*kind) == *dtype);
            (known.ok_or_else(|| unknown_dtype(WRITE, name, dtype))?.0, shape.clone())
        }
    };
    let size = shape.iter().try_fold(dtype.bitsize() / 8, |size, &length: &usize| size.checked_mul(length));
    let size = size.ok_or_else(|| CatError::adapter(WRITE, format!("`{name}` has a size beyond 2^64")))?;
    Ok(TensorInfo { dtype, shape, data_offsets: (0, size) })
}

/// The file's name of a tensor's dtype.
pub fn dtype_of(op: &'static str, name: &str, tensor: &Tensor) -> Result<Dtype> {
    let kind = tensor.f_kind().during(op)?;
    let known = DTYPES.iter().find(|(_, other)| *other == kind);
    known.map(|(dtype, _)| *dtype).ok_or_else(|| unknown_dtype(op, name, &dtype_name(kind)))
}

fn unknown_dtype(op: &'static str, name: &str, dtype: &str) -> CatError {
    CatError::adapter(op, format!("`{name}` must have dtype {DTYPE_NAMES}, got {dtype}"))
}

/// The start of the file, its keys in order.
fn header(entries: &[(String, Source, TensorInfo)], metadata: Metadata) -> Result<Vec<u8>> {
    let failed = |error: serde_json::Error| CatError::adapter(WRITE, format!("the header cannot be made: {error}"));
    let mut fields = BTreeMap::from([(METADATA, serde_json::to_value(metadata).map_err(failed)?)]);
    for (name, _, info) in entries {
        if fields.insert(name, serde_json::to_value(info).map_err(failed)?).is_some() {
            return Err(CatError::adapter(WRITE, format!("expected tensors of different names, got two of `{name}`")));
        }
    }
    let mut text = serde_json::to_vec(&fields).map_err(failed)?;
    // As the format asks for, tensors begin at a multiple of 8.
    text.resize(text.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
}

/// Refuses a header that has a name twice: readers of JSON keep one of the two in silence.
#[derive(Clone, Copy)]
struct NamesOnce;

impl<'de> DeserializeSeed<'de> for NamesOnce {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NamesOnce {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_unit<E: Error>(self) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value_seed(self)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
            if let Some(name) = names.replace(name) {
                return Err(A::Error::custom(format_args!("it has `{name}` twice")));
            }
        }
        Ok(())
    }
}

/// The whole file, after a look at the header's length: a large file of another kind is not read.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let failed = |source: io::Error| CatError::io(READ, path, source);
    // Without the flag, opening a pipe waits for somebody who writes to it.
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let information = file.metadata().map_err(failed)?;
    if information.is_dir() {
        return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    if !information.is_file() {
        return Err(not_safetensors(path, "it is a pipe or a device"));
    }
    let length = information.len();
    let mut start = [0; LENGTH_BYTES as usize];
    if length < LENGTH_BYTES {
        return Err(not_safetensors(path, &format!("it has {length} bytes, less than a header's length takes")));
    }
    file.read_exact(&mut start).map_err(failed)?;
    let header = u64::from_le_bytes(start);
    if header > length - LENGTH_BYTES {
        let text = format!("its header would have {header} bytes, but the file has {length}");
        return Err(not_safetensors(path, &text));
    }
    if header > LONGEST_HEADER {
        return Err(not_safetensors(path, &reason(&SafeTensorError::HeaderTooLarge)));
    }
    let mut bytes = start.to_vec();
    file.read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn not_safetensors(path: &Path, text: &str) -> CatError {
    CatError::adapter(READ, format!("{}: expected a whole safetensors file, but {text}", path.display()))
}

/// safetensors' errors in words; its own texts are names of variants.
fn reason(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::InvalidHeader(_) => "its header is not UTF-8".into(),
        SafeTensorError::InvalidHeaderDeserialization(error) => format!("its header is not valid: {error}"),
        SafeTensorError::HeaderTooLarge => "its header is larger than 100 MB".into(),
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => "its header is cut off".into(),
        SafeTensorError::MetadataIncompleteBuffer => "its data is cut off, or followed by something else".into(),
        SafeTensorError::InvalidOffset(name) => format!("the place of `{name}` in it is not valid"),
        SafeTensorError::TensorInvalidInfo => "a tensor's place does not fit its shape".into(),
        SafeTensorError::ValidationOverflow => "a tensor's size is beyond 2^64".into(),
        other => format!("{other}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use tch::Device;

    use super::*;

    /// A folder that goes away with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("cat-rs-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, bytes: &[u8]) -> PathBuf {
            let path = self.0.join("adapter.safetensors");
            fs::write(&path, bytes).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn written(path: &Path, tensors: Vec<(String, Source)>, metadata: &Metadata) -> Result<()> {
        write(File::create(path).unwrap(), path, tensors, metadata.clone())
    }

    fn whole(name: &str, tensor: &Tensor) -> (String, Source) {
        (name.to_owned(), Source::Whole(tensor.shallow_clone()))
    }

    fn in_parts(name: &str, dtype: &str, shape: &[usize], parts: &[Tensor]) -> (String, Source) {
        let parts: Vec<Tensor> = parts.iter().map(Tensor::shallow_clone).collect();
        let source = Source::Parts { dtype: dtype.into(), shape: shape.to_vec(), parts: Box::new(parts.into_iter()) };
        (name.to_owned(), source)
    }

    fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn tensors_and_metadata_survive_exactly() {
        let folder = Folder::new("round-trip");
        let path = folder.0.join("adapter.safetensors");
        let values = Tensor::from_slice(&[1.0f64 / 3.0, -0.0, f64::NAN, f64::INFINITY, 1e-40, 7.0]).view([2, 3]);
        let tensors: NamedTensors = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half]
            .iter()
            .map(|&kind| (format!("{kind:?}"), values.to_kind(kind)))
            .chain([
                ("scalar".to_owned(), Tensor::from(8i64)),
                ("empty".to_owned(), Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))),
                ("turned".to_owned(), values.tr()),
            ])
            .collect();
        let metadata = Metadata::from([("key".to_owned(), "{\"ü\": 1}\n".to_owned())]);
        let sources = tensors.iter().map(|(name, tensor)| whole(name, tensor)).collect();
        written(&path, sources, &metadata).unwrap();
        let (read_tensors, read_metadata) = read(&path).unwrap();
        assert_eq!(read_metadata, metadata);
        assert_eq!(read_tensors.len(), tensors.len());
        for (name, tensor) in &tensors {
            let (_, other) = read_tensors.iter().find(|(other, _)| other == name).unwrap();
            assert_eq!((tensor.kind(), tensor.size()), (other.kind(), other.size()), "{name}");
            let bits = |tensor: &Tensor| tensor.contiguous().view([-1]).view_dtype(Kind::Uint8);
            assert!(bits(tensor).equal(&bits(other)), "{name}");
        }
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
    }

    #[test]
    fn broken_files_are_told_apart() {
        let folder = Folder::new("broken");
        let tensor = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let twice = &tensor[1..tensor.len() - 1];
        let cases: [(&str, Vec<u8>, &str); 15] = [
            ("empty", vec![], "it has 0 bytes"),
            ("short", vec![1, 2, 3], "it has 3 bytes"),
            ("huge length", u64::MAX.to_le_bytes().to_vec(), "its header would have 18446744073709551615 bytes"),
            ("cut header", with_header(tensor, &[0; 8])[..20].to_vec(), "its header would have"),
            ("cut data", with_header(tensor, &[0; 7]), "its data is cut off"),
            ("long data", with_header(tensor, &[0; 9]), "its data is cut off, or followed by"),
            ("not JSON", with_header("{nonsense}", &[]), "its header is not valid"),
            ("not UTF-8", [2u64.to_le_bytes().to_vec(), vec![0xff, 0xfe]].concat(), "its header is not UTF-8"),
            ("dtype", with_header(&tensor.replace("F32", "F8_E4M3").replace(",8]", ",2]"), &[0; 2]), "got F8_E4M3"),
            ("unknown dtype", with_header(&tensor.replace("F32", "Q7"), &[0; 8]), "its header is not valid"),
            ("shape", with_header(&tensor.replace("[2]", "[3]"), &[0; 8]), "does not fit its shape"),
            ("name twice", with_header(&format!("{{{twice},{twice}}}"), &[0; 8]), "it has `a` twice"),
            (
                "key twice",
                with_header(&format!(r#"{{"__metadata__":{{"k":"1","k":"2"}},{twice}}}"#), &[0; 8]),
                "it has `k` twice",
            ),
            (
                "long header",
                [100_000_001u64.to_le_bytes().to_vec(), vec![b' '; 100_000_001]].concat(),
                "its header is larger than 100 MB",
            ),
            ("overflow", with_header(&tensor.replace("[2]", "[9223372036854775807,9]"), &[0; 8]), "beyond 2^64"),
        ];
        for (name, bytes, expected) in cases {
            let path = folder.file(&bytes);
            let error = read(&path).unwrap_err();
            assert!(matches!(error, CatError::Adapter { .. }), "{name}: {error:?}");
            let text = error.to_string();
            assert!(text.contains(expected) && text.contains("adapter.safetensors"), "{name}: {text}");
        }
    }

    #[test]
    fn every_cut_of_a_file_is_an_error() {
        let folder = Folder::new("cuts");
        let path = folder.0.join("whole.safetensors");
        written(&path, vec![whole("a", &Tensor::from_slice(&[1.0f32, 2.0]))], &Metadata::new()).unwrap();
        let bytes = fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            assert!(read(&folder.file(&bytes[..length])).is_err(), "{length}");
        }
    }

    #[test]
    fn parts_give_the_bytes_of_the_whole() {
        let folder = Folder::new("parts");
        let values = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([4, 3]);
        let other = Tensor::from_slice(&[7i64]);
        let path = |name: &str| folder.0.join(name);
        written(&path("whole"), vec![whole("a", &values), whole("b", &other)], &Metadata::new()).unwrap();
        let parts = [values.narrow(0, 0, 1), values.narrow(0, 1, 3)];
        let parts = in_parts("a", "float32", &[4, 3], &parts);
        written(&path("parts"), vec![whole("b", &other), parts], &Metadata::new()).unwrap();
        assert_eq!(fs::read(path("whole")).unwrap(), fs::read(path("parts")).unwrap());
    }

    #[test]
    fn parts_must_make_up_the_whole() {
        let folder = Folder::new("wrong-parts");
        let part = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        for (dtype, shape, expected) in [
            ("float32", [3], "parts of 12 bytes together, got 8"),
            ("float32", [1], "parts of 4 bytes together, got 8"),
            ("int64", [1], "parts of dtype I64, got F32"),
            ("complex64", [2], "must have dtype float64"),
            ("float32", [usize::MAX], "a size beyond 2^64"),
        ] {
            let source = in_parts("a", dtype, &shape, &[part.shallow_clone()]);
            let error = written(&folder.0.join("a"), vec![source], &Metadata::new()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let twice = vec![whole("a", &part), whole("a", &part)];
        let error = written(&folder.0.join("a"), twice, &Metadata::new()).unwrap_err();
        assert!(error.to_string().contains("got two of `a`"), "{error}");
    }

    #[test]
    fn missing_files_and_folders_are_io_errors() {
        let folder = Folder::new("missing");
        for (path, kind) in [
            (folder.0.join("absent.safetensors"), io::ErrorKind::NotFound),
            (folder.0.clone(), io::ErrorKind::IsADirectory),
        ] {
            match read(&path).unwrap_err() {
                CatError::Io { source, .. } => assert_eq!(source.kind(), kind),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn tensors_that_cannot_be_stored_are_named() {
        let folder = Folder::new("dtype");
        let complex = Tensor::zeros([2], (Kind::ComplexFloat, tch::Device::Cpu));
        let error = written(&folder.0.join("a"), vec![whole("wave", &complex)], &Metadata::new()).unwrap_err();
        assert!(error.to_string().contains("`wave` must have dtype"), "{error}");
    }
}
