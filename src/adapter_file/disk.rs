//! Safetensors files: read whole, written under a temporary name and renamed.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use tch::{Device, Kind, Tensor};

use super::{Metadata, NamedTensors};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{check_dense, contiguous, dtype_name};

const READ: &str = "load_lora";
const WRITE: &str = "save_lora";
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
/// As `cat_rs.atomic` names what is not finished.
const TEMPORARY_PREFIX: &str = ".unfinished-";
/// Bytes of the header's length, at the start of the file.
const LENGTH_BYTES: u64 = 8;

/// Reads every tensor and the metadata of a safetensors file.
pub fn read(path: &Path) -> Result<(NamedTensors, Metadata)> {
    let bytes = read_bytes(path)?;
    let damaged = |error: SafeTensorError| not_safetensors(path, &reason(&error));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let file = SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let mut tensors = Vec::with_capacity(file.len());
    for (name, view) in file.iter() {
        let Some((_, kind)) = DTYPES.iter().find(|(dtype, _)| *dtype == view.dtype()) else {
            let expected = "float64, float32, float16, bfloat16 or integers";
            let text = format!("{}: `{name}` must have dtype {expected}, got {:?}", path.display(), view.dtype());
            return Err(CatError::adapter(READ, text));
        };
        let size =
            view.shape().iter().map(|&length| i64::try_from(length)).collect::<std::result::Result<Vec<_>, _>>();
        let size = size.map_err(|_| not_safetensors(path, &format!("`{name}` has a size beyond 2^63")))?;
        tensors.push((name.to_owned(), Tensor::f_from_data_size(view.data(), &size, *kind).during(READ)?));
    }
    tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok((tensors, metadata))
}

/// Writes a safetensors file; an old file of that name stays until the new one is whole.
pub fn write(path: &Path, tensors: &[(String, Tensor)], metadata: &Metadata) -> Result<()> {
    if tensors.is_empty() {
        return Err(CatError::adapter(WRITE, format!("{}: expected tensors to write, got none", path.display())));
    }
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        views.push((name.as_str(), Bytes::of(name, tensor)?));
    }
    let metadata: HashMap<String, String> = metadata.clone().into_iter().collect();
    let bytes = safetensors::serialize(views, Some(metadata))
        .map_err(|error| CatError::adapter(WRITE, format!("{}: {}", path.display(), reason(&error))))?;
    replace(path, &in_order(&bytes)?).map_err(|source| CatError::io(WRITE, path, source))
}

/// The same file with the keys of its header in order: that of a hash map differs from file to file.
fn in_order(file: &[u8]) -> Result<Vec<u8>> {
    let broken = || CatError::adapter(WRITE, "the header that was made cannot be read");
    let (length, rest) = file.split_first_chunk().ok_or_else(broken)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| broken())?;
    let (header, data) = rest.split_at_checked(length).ok_or_else(broken)?;
    let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).map_err(|_| broken())?;
    let mut header = serde_json::to_vec(&header).map_err(|_| broken())?;
    // As the format asks for, tensors begin at a multiple of 8.
    header.resize(header.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    Ok([&(header.len() as u64).to_le_bytes(), header.as_slice(), data].concat())
}

/// A tensor's bytes as safetensors takes them.
struct Bytes {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Bytes {
    fn of(name: &str, tensor: &Tensor) -> Result<Self> {
        check_dense(WRITE, "state", tensor, Device::Cpu)?;
        let kind = tensor.f_kind().during(WRITE)?;
        let Some((dtype, _)) = DTYPES.iter().find(|(_, other)| *other == kind) else {
            let expected = "float64, float32, float16, bfloat16 or integers";
            let text = format!("`{name}` must have dtype {expected}, got {}", dtype_name(kind));
            return Err(CatError::adapter(WRITE, text));
        };
        let tensor = contiguous(WRITE, tensor)?;
        let mut data = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut data, tensor.numel()).during(WRITE)?;
        let shape = tensor.size().iter().map(|&length| usize::try_from(length).unwrap_or(0)).collect();
        Ok(Self { dtype: *dtype, shape, data })
    }
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// The whole file, after a look at the header's length: a large file of another kind is not read.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let failed = |source: io::Error| CatError::io(READ, path, source);
    let mut file = File::open(path).map_err(failed)?;
    let information = file.metadata().map_err(failed)?;
    if information.is_dir() {
        return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
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
    let mut bytes = start.to_vec();
    file.read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_name(path)?;
    let written = write_synced(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // What went wrong first is what the caller is told.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_folder_of(path)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Brings the rename to the disk.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EISDIR))?;
    let mut temporary = OsString::from(TEMPORARY_PREFIX);
    temporary.push(name);
    Ok(path.with_file_name(temporary))
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
                ("empty".to_owned(), Tensor::zeros([0, 4], (Kind::Float, tch::Device::Cpu))),
                ("turned".to_owned(), values.tr()),
            ])
            .collect();
        let metadata = Metadata::from([("key".to_owned(), "{\"ü\": 1}\n".to_owned())]);
        write(&path, &tensors, &metadata).unwrap();
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
        let cases: [(&str, Vec<u8>, &str); 12] = [
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
        write(&path, &[("a".to_owned(), Tensor::from_slice(&[1.0f32, 2.0]))], &Metadata::new()).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            assert!(read(&folder.file(&whole[..length])).is_err(), "{length}");
        }
    }

    fn one() -> [(String, Tensor); 1] {
        [("a".to_owned(), Tensor::zeros([2], (Kind::Float, tch::Device::Cpu)))]
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
        let error = write(&folder.0.join("absent/a.safetensors"), &one(), &Metadata::new()).unwrap_err();
        assert!(matches!(error, CatError::Io { .. }), "{error:?}");
    }

    #[test]
    fn an_old_file_stays_when_writing_fails() {
        let folder = Folder::new("old");
        let path = folder.file(b"old");
        // The temporary name is taken by a folder, so that the file cannot be created.
        fs::create_dir(folder.0.join(".unfinished-adapter.safetensors")).unwrap();
        assert!(matches!(write(&path, &one(), &Metadata::new()).unwrap_err(), CatError::Io { .. }));
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn tensors_that_cannot_be_stored_are_named() {
        let folder = Folder::new("dtype");
        let complex = Tensor::zeros([2], (Kind::ComplexFloat, tch::Device::Cpu));
        let error = write(&folder.0.join("a"), &[("wave".to_owned(), complex)], &Metadata::new()).unwrap_err();
        assert!(error.to_string().contains("`wave` must have dtype"), "{error}");
    }
}
