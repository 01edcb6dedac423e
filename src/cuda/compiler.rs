//! NVRTC, the compiler that PyTorch's CUDA builds bring along.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::ptr;

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

/// PyTorch has loaded one of these, or the system has one.
const NAMES: [&CStr; 2] = [c"libnvrtc.so.13", c"libnvrtc.so.12"];

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
    /// The NVRTC that PyTorch brought along.
    pub fn find() -> std::result::Result<Self, String> {
        let loaded = NAMES.iter().find_map(|name| Library::loaded(name));
        let library = loaded.or_else(|| NAMES.iter().find_map(|name| Library::find(name)));
        let missing = "NVRTC was not found (libnvrtc.so.13 or .12): PyTorch's CUDA builds bring it along";
        CompilerFunctions::of(&library.ok_or(missing)?).map(Self)
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

    /// The options that compile for a device of this compute capability, and whether the result is PTX.
    pub fn options(&self, op: &'static str, architecture: u32) -> Result<(Vec<String>, bool)> {
        let mut count = 0;
        // SAFETY: writes one integer, then as many as that.
        let known = unsafe {
            self.check(op, "nvrtcGetNumSupportedArchs", (self.0.architecture_count)(&raw mut count))?;
            let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
            self.check(op, "nvrtcGetSupportedArchs", (self.0.architectures)(known.as_mut_ptr()))?;
            known
        };
        let known = known.into_iter().filter_map(|architecture| u32::try_from(architecture).ok());
        let Some(best) = known.filter(|&known| known <= architecture).max() else {
            let message = format!("NVRTC does not compile for compute capability {}", capability(architecture));
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
