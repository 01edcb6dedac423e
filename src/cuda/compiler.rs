//! NVRTC, the compiler that PyTorch's CUDA builds bring along.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use super::library::{functions, Library};
use super::Program;
use crate::error::{CatError, Result};

functions! {
    /// What is used of NVRTC.
    CompilerFunctions {
        error_string = c"nvrtcGetErrorString"(c_int) -> *const c_char;
        version = c"nvrtcVersion"(*mut c_int, *mut c_int) -> c_int;
        architecture_count = c"nvrtcGetNumSupportedArchs"(*mut c_int) -> c_int;
        architectures = c"nvrtcGetSupportedArchs"(*mut c_int) -> c_int;
        create = c"nvrtcCreateProgram"(
            *mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> c_int;
        compile = c"nvrtcCompileProgram"(*mut c_void, c_int, *const *const c_char) -> c_int;
        destroy = c"nvrtcDestroyProgram"(*mut *mut c_void) -> c_int;
        log_size = c"nvrtcGetProgramLogSize"(*mut c_void, *mut usize) -> c_int;
        log = c"nvrtcGetProgramLog"(*mut c_void, *mut c_char) -> c_int;
        cubin_size = c"nvrtcGetCUBINSize"(*mut c_void, *mut usize) -> c_int;
        cubin = c"nvrtcGetCUBIN"(*mut c_void, *mut c_char) -> c_int;
        ptx_size = c"nvrtcGetPTXSize"(*mut c_void, *mut usize) -> c_int;
        ptx = c"nvrtcGetPTX"(*mut c_void, *mut c_char) -> c_int;
    }
}

type Size = unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int;
type Read = unsafe extern "C" fn(*mut c_void, *mut c_char) -> c_int;

/// Major versions of CUDA where PyTorch is built for none.
const MAJORS: [&str; 2] = ["13", "12"];

/// What PyTorch is built for, and where it lies.
#[derive(Clone, Debug, Default)]
pub struct TorchCuda {
    /// `torch.version.cuda`: "13.0", or `None`.
    pub version: Option<String>,
    /// The folder of the package torch.
    pub folder: PathBuf,
}

static TORCH: OnceLock<TorchCuda> = OnceLock::new();

impl TorchCuda {
    /// Tells which PyTorch this process has; the first time counts.
    pub fn set(self) {
        let _ = TORCH.set(self);
    }

    /// The major versions whose NVRTC makes what PyTorch's driver runs, best first.
    fn majors(&self) -> Vec<&str> {
        match self.version.as_deref().and_then(|version| version.split('.').next()) {
            Some(major) => vec![major],
            None => MAJORS.to_vec(),
        }
    }

    /// NVRTC's files in the folders of NVIDIA's packages, which lie beside torch, and in torch's own; then what the
    /// system knows by name; at last PyTorch's own library around NVRTC, whose dependencies have the functions.
    fn candidates(&self) -> Vec<PathBuf> {
        let nvidia = self.folder.parent().unwrap_or(Path::new("")).join("nvidia");
        let own = self.folder.join("lib");
        let of_major = |major: &str| {
            let name = format!("libnvrtc.so.{major}");
            let folders = [nvidia.join(format!("cu{major}/lib")), nvidia.join("cuda_nvrtc/lib"), own.clone()];
            let files = folders.map(|folder| folder.join(&name)).into_iter().filter(|file| file.is_file());
            files.chain([PathBuf::from(name.clone())]).collect::<Vec<_>>()
        };
        let last = own.join("libcaffe2_nvrtc.so");
        self.majors().into_iter().flat_map(of_major).chain(last.is_file().then_some(last)).collect()
    }
}

/// The C string of a path.
fn c_path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}

/// What NVRTC looks for by name when it compiles, from beside it.
fn load_builtins(library: &Path) {
    let files = library.parent().and_then(|folder| folder.read_dir().ok()).into_iter().flatten().flatten();
    for file in files.filter(|file| file.file_name().as_bytes().starts_with(b"libnvrtc-builtins.so")) {
        c_path(&file.path()).and_then(|path| Library::find(&path));
    }
}

/// The compiler of this process.
#[derive(Clone, Copy, Debug)]
pub struct Compiler(CompilerFunctions);

/// What a device runs, and what the compiler said.
#[derive(Debug)]
pub struct Compiled {
    /// A cubin, or PTX for devices newer than the compiler.
    pub image: Vec<u8>,
    /// Warnings; empty where there are none.
    pub log: String,
}

impl Compiler {
    /// The NVRTC of the CUDA that PyTorch is built for.
    pub fn find() -> std::result::Result<Self, String> {
        Self::beside(TORCH.get().unwrap_or(&TorchCuda::default()))
    }

    fn beside(torch: &TorchCuda) -> std::result::Result<Self, String> {
        let names = torch.majors().into_iter().map(|major| format!("libnvrtc.so.{major}")).collect::<Vec<_>>();
        let candidates = torch.candidates();
        candidates.iter().filter(|path| path.is_file()).for_each(|path| load_builtins(path));
        // PyTorch may have loaded it already.
        let loaded = names.iter().find_map(|name| Library::loaded(&CString::new(name.as_str()).ok()?));
        let open = |path: &PathBuf| CompilerFunctions::of(&Library::find(&c_path(path)?)?).ok();
        let found = loaded.and_then(|library| CompilerFunctions::of(&library).ok());
        let found = found.or_else(|| candidates.iter().find_map(open));
        let missing = || format!("NVRTC was not found ({}): PyTorch's CUDA builds bring it along", names.join(" or "));
        found.map(Self).ok_or_else(missing)
    }

    /// A compiler of these functions.
    #[cfg(test)]
    pub fn of(functions: CompilerFunctions) -> Self {
        Self(functions)
    }

    /// (13, 0) for 13.0
    pub fn version(&self) -> Result<(i32, i32)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        self.check("info", "nvrtcVersion", unsafe { (self.0.version)(&raw mut major, &raw mut minor) })?;
        Ok((major, minor))
    }

    /// The compute capabilities that it compiles for, 90 for 9.0.
    pub fn architectures(&self, op: &'static str) -> Result<Vec<u32>> {
        let mut count = 0;
        // SAFETY: writes one integer, then as many as that.
        let known = unsafe {
            self.check(op, "nvrtcGetNumSupportedArchs", (self.0.architecture_count)(&raw mut count))?;
            let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
            self.check(op, "nvrtcGetSupportedArchs", (self.0.architectures)(known.as_mut_ptr()))?;
            known
        };
        Ok(known.into_iter().filter_map(|architecture| u32::try_from(architecture).ok()).collect())
    }

    /// The options that compile for a device of this compute capability, and whether the result is PTX.
    pub fn options(&self, op: &'static str, architecture: u32) -> Result<(Vec<String>, bool)> {
        let known = self.architectures(op)?;
        let Some(&best) = known.iter().filter(|&&known| known <= architecture).max() else {
            let first = known.iter().min().map_or_else(|| "none".into(), |&first| capability(first));
            let message = format!(
                "NVRTC does not compile for compute capability {}, but from {first} on: cat-rs info names the PyTorch \
                 build that it needs",
                capability(architecture)
            );
            return Err(CatError::cuda(op, message));
        };
        // Machine code runs on later devices of its generation; later generations need the driver's compiler.
        let is_ptx = best / 10 != architecture / 10;
        let target = if is_ptx { format!("compute_{best}") } else { format!("sm_{best}") };
        Ok((vec![format!("--gpu-architecture={target}"), "--std=c++17".into()], is_ptx))
    }

    /// Compiles a program for a device of this compute capability.
    pub fn compile(
        &self,
        op: &'static str,
        program: &Program,
        defines: &[(&str, &str)],
        architecture: u32,
    ) -> Result<Compiled> {
        let (mut options, is_ptx) = self.options(op, architecture)?;
        options.extend(defines.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
        let c_string = |text: &str| CString::new(text).map_err(|_| CatError::cuda(op, "a zero in a kernel's source"));
        let (source, name) = (c_string(&program.text())?, c_string(&format!("{}.cu", program.name))?);
        let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>>>()?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();

        let mut handle = ptr::null_mut();
        // SAFETY: C strings that outlive the program, and no headers.
        let status =
            unsafe { (self.0.create)(&raw mut handle, source.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null()) };
        self.check(op, "nvrtcCreateProgram", status)?;
        let compiled = self.compile_created(op, program, handle, &options, is_ptx);
        // SAFETY: created above, and not used again.
        unsafe { (self.0.destroy)(&raw mut handle) };
        compiled
    }

    fn compile_created(
        &self,
        op: &'static str,
        program: &Program,
        handle: *mut c_void,
        options: &[*const c_char],
        is_ptx: bool,
    ) -> Result<Compiled> {
        let count = c_int::try_from(options.len()).unwrap_or(c_int::MAX);
        // SAFETY: a live program, and as many C strings.
        let status = unsafe { (self.0.compile)(handle, count, options.as_ptr()) };
        let log = self.read(op, "nvrtcGetProgramLog", handle, (self.0.log_size, self.0.log))?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
        self.check(op, "nvrtcCompileProgram", status).map_err(|error| match error {
            CatError::Cuda { message, .. } => CatError::cuda(op, format!("{message}, of {}.cu: {log}", program.name)),
            other => other,
        })?;
        let image = if is_ptx {
            self.read(op, "nvrtcGetPTX", handle, (self.0.ptx_size, self.0.ptx))?
        } else {
            self.read(op, "nvrtcGetCUBIN", handle, (self.0.cubin_size, self.0.cubin))?
        };
        Ok(Compiled { image, log })
    }

    fn read(&self, op: &'static str, call: &str, handle: *mut c_void, (size, read): (Size, Read)) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: writes one number, then as many bytes as that.
        unsafe {
            self.check(op, call, size(handle, &raw mut length))?;
            let mut bytes = vec![0u8; length];
            self.check(op, call, read(handle, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }

    fn check(&self, op: &'static str, call: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: a constant of the library's for every code.
        let name = unsafe {
            let text = (self.0.error_string)(status);
            if text.is_null() {
                "unknown".into()
            } else {
                CStr::from_ptr(text).to_string_lossy()
            }
        };
        Err(CatError::cuda(op, format!("{call} failed with {name} ({status})")))
    }
}

fn capability(architecture: u32) -> String {
    format!("{}.{}", architecture / 10, architecture % 10)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cuda::fake;

    /// An environment with torch and these files beside it.
    fn environment(version: Option<&str>, files: &[&str]) -> (PathBuf, TorchCuda) {
        let site = fake::new_folder();
        for file in files {
            let path = site.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let torch = TorchCuda { version: version.map(str::to_owned), folder: site.join("torch") };
        (site, torch)
    }

    fn candidates(version: Option<&str>, files: &[&str]) -> Vec<String> {
        let (site, torch) = environment(version, files);
        let found = torch.candidates();
        let _ = fs::remove_dir_all(&site);
        let relative = |path: PathBuf| path.strip_prefix(&site).unwrap_or(&path).to_str().unwrap().to_owned();
        found.into_iter().map(relative).collect()
    }

    #[test]
    fn nvrtc_is_that_of_pytorchs_cuda() {
        let files = [
            "nvidia/cu13/lib/libnvrtc.so.13",
            "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "torch/lib/libcaffe2_nvrtc.so",
            "torch/lib/libnvrtc.so.12",
        ];
        let [thirteen, twelve, last, bundled] = files;
        assert_eq!(candidates(Some("13.0"), &files), [thirteen, "libnvrtc.so.13", last]);
        assert_eq!(candidates(Some("12.6"), &files), [twelve, bundled, "libnvrtc.so.12", last]);
        assert_eq!(candidates(None, &files), [thirteen, "libnvrtc.so.13", twelve, bundled, "libnvrtc.so.12", last]);
        assert_eq!(candidates(Some("12.6"), &files[..1]), ["libnvrtc.so.12"]);
    }

    #[test]
    fn another_cudas_nvrtc_is_none() {
        let (site, torch) = environment(Some("9.2"), &["nvidia/cu13/lib/libnvrtc.so.13"]);
        let error = Compiler::beside(&torch).unwrap_err();
        assert_eq!(error, "NVRTC was not found (libnvrtc.so.9): PyTorch's CUDA builds bring it along");
        let _ = fs::remove_dir_all(site);
    }

    #[test]
    fn builtins_come_from_beside_nvrtc_and_functions_from_dependencies() {
        let build = |folder: &Path, name: &str, source: &str, more: &[&str]| {
            fs::create_dir_all(folder).unwrap();
            let (from, to) = (folder.join("source.c"), folder.join(name));
            fs::write(&from, source).unwrap();
            let mut command = std::process::Command::new("cc");
            command.args(["-shared", "-fPIC", "-o"]).arg(&to).arg(&from).arg(format!("-Wl,-soname,{name}")).args(more);
            assert!(command.status().unwrap().success());
        };
        let site = fake::new_folder();
        let own = site.join("torch/lib");
        let names = [
            "GetErrorString",
            "Version",
            "GetNumSupportedArchs",
            "GetSupportedArchs",
            "CreateProgram",
            "CompileProgram",
            "DestroyProgram",
            "GetProgramLogSize",
            "GetProgramLog",
            "GetCUBINSize",
            "GetCUBIN",
            "GetPTXSize",
            "GetPTX",
        ];
        let source: String = names.iter().map(|name| format!("int nvrtc{name}(void) {{ return 0; }}\n")).collect();
        // A PyTorch that brings NVRTC under a name of its own.
        build(&own, "libnvrtc-1234.so.8", &source, &[]);
        build(&own, "libnvrtc-builtins.so.8.1", "int builtins_of_a_test;", &[]);
        let rpath = format!("-Wl,-rpath,{}", own.display());
        let folder = format!("-L{}", own.display());
        let needs = ["-Wl,--no-as-needed", &folder, "-l:libnvrtc-1234.so.8", &rpath];
        build(&own, "libcaffe2_nvrtc.so", "int of_pytorch;", &needs);
        let torch = TorchCuda { version: Some("8.1".into()), folder: site.join("torch") };
        assert!(Compiler::beside(&torch).is_ok());
        assert!(Library::loaded(c"libnvrtc-builtins.so.8.1").is_some());
        let _ = fs::remove_dir_all(site);
    }
}
