//! A driver and a compiler that run kernels on the CPU, for tests: tests/cuda/shim.hpp compiles their sources as C++.
//!
//! Its "machine code" is the path of a shared library. Memory of the device is memory of the host, so tensors on the CPU
//! take the place of tensors on CUDA.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr, CString};
use std::fs;
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::cache::Cache;
use super::compiler::{Compiler, CompilerFunctions};
use super::driver::{Driver, DriverFunctions};
use super::{Stream, Toolkit};

/// Devices that there are.
const DEVICES: c_int = 2;
/// CUDA's codes of some errors.
const INVALID_DEVICE: c_int = 101;
const INVALID_IMAGE: c_int = 200;
const INVALID_CONTEXT: c_int = 201;
const NOT_FOUND: c_int = 500;
const LAUNCH_FAILED: c_int = 719;
/// NVRTC's code of an error in the source.
const COMPILATION: c_int = 6;

/// Compilations so far, of all tests.
static COMPILATIONS: AtomicUsize = AtomicUsize::new(0);
/// The compute capability of the devices.
static ARCHITECTURE: AtomicUsize = AtomicUsize::new(90);

thread_local! {
    static CURRENT: Cell<*mut c_void> = const { Cell::new(std::ptr::null_mut()) };
    static STREAM: Cell<u64> = const { Cell::new(0) };
}

/// Shared libraries that the tests so far have not removed.
static LIBRARIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// What the calls of one test do to the state of the driver, which is the process's, others must not see.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a test with a toolkit of its own, whose cache is a new folder.
pub fn alone(test: impl FnOnce(&Toolkit)) {
    let _guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    ARCHITECTURE.store(90, Ordering::Relaxed);
    CURRENT.set(std::ptr::null_mut());
    let folder = new_folder();
    test(&toolkit(folder.clone()));
    let _ = fs::remove_dir_all(folder);
    for library in LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = fs::remove_file(library);
    }
}

/// Runs a test of kernels on a stream of a device.
pub fn with_stream(op: &'static str, test: impl FnOnce(&Stream)) {
    alone(|toolkit| test(&toolkit.stream(op, 0, 7).unwrap()));
}

/// A toolkit that caches in that folder.
pub fn toolkit(cache: PathBuf) -> Toolkit {
    Toolkit::new(Driver::of(DRIVER), Compiler::of(COMPILER), Cache::of(cache))
}

/// The compiler alone.
pub fn compiler() -> Compiler {
    Compiler::of(COMPILER)
}

/// A folder that no other test has.
pub fn new_folder() -> PathBuf {
    static FOLDERS: AtomicUsize = AtomicUsize::new(0);
    let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("cat-rs-fake-cuda-{}-{number}", process::id()))
}

/// Compilations so far.
pub fn compilations() -> usize {
    COMPILATIONS.load(Ordering::Relaxed)
}

/// Makes the devices ones of that compute capability.
pub fn set_architecture(architecture: usize) {
    ARCHITECTURE.store(architecture, Ordering::Relaxed);
}

/// This thread's current context.
pub fn current_context() -> *mut c_void {
    CURRENT.get()
}

/// Makes a context current.
pub fn set_current(context: *mut c_void) {
    CURRENT.set(context);
}

/// The context of a device.
pub fn context_of(device: usize) -> *mut c_void {
    (0x1000 + device) as *mut c_void
}

/// The stream of the last launch.
pub fn last_stream() -> u64 {
    STREAM.get()
}

const DRIVER: DriverFunctions = DriverFunctions {
    error_name,
    error_string,
    version: driver_version,
    device,
    device_attribute,
    retain_primary_context,
    current_context: get_context,
    set_current_context: set_context,
    load_module,
    function,
    launch,
};

unsafe extern "C" fn error_name(status: c_int, name: *mut *const c_char) -> c_int {
    unsafe { *name = if status == LAUNCH_FAILED { c"CUDA_ERROR_LAUNCH_FAILED".as_ptr() } else { c"OTHER".as_ptr() } };
    0
}

unsafe extern "C" fn error_string(status: c_int, text: *mut *const c_char) -> c_int {
    if status != LAUNCH_FAILED {
        return 1;
    }
    unsafe { *text = c"unspecified launch failure".as_ptr() };
    0
}

unsafe extern "C" fn driver_version(version: *mut c_int) -> c_int {
    unsafe { *version = 13010 };
    0
}

unsafe extern "C" fn device(device: *mut c_int, ordinal: c_int) -> c_int {
    unsafe { *device = ordinal };
    if ordinal < DEVICES {
        0
    } else {
        INVALID_DEVICE
    }
}

unsafe extern "C" fn device_attribute(value: *mut c_int, attribute: c_int, _: c_int) -> c_int {
    let architecture = ARCHITECTURE.load(Ordering::Relaxed) as c_int;
    let known = match attribute {
        16 => 2,
        75 => architecture / 10,
        76 => architecture % 10,
        _ => return 1,
    };
    unsafe { *value = known };
    0
}

unsafe extern "C" fn retain_primary_context(context: *mut *mut c_void, device: c_int) -> c_int {
    unsafe { *context = context_of(device as usize) };
    0
}

unsafe extern "C" fn get_context(context: *mut *mut c_void) -> c_int {
    unsafe { *context = CURRENT.get() };
    0
}

unsafe extern "C" fn set_context(context: *mut c_void) -> c_int {
    CURRENT.set(context);
    0
}

unsafe extern "C" fn load_module(module: *mut *mut c_void, image: *const c_void) -> c_int {
    if CURRENT.get().is_null() {
        return INVALID_CONTEXT;
    }
    unsafe { *module = libc::dlopen(image.cast(), libc::RTLD_NOW) };
    if unsafe { (*module).is_null() } {
        INVALID_IMAGE
    } else {
        0
    }
}

unsafe extern "C" fn function(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) -> c_int {
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
    let symbol = CString::new(format!("run_{name}")).unwrap();
    unsafe { *function = libc::dlsym(module, symbol.as_ptr()) };
    if unsafe { (*function).is_null() } {
        NOT_FOUND
    } else {
        0
    }
}

type Run = unsafe extern "C" fn(*const c_void, c_uint, c_uint, bool) -> *const c_char;

unsafe extern "C" fn launch(
    function: *mut c_void,
    x: c_uint,
    y: c_uint,
    z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    stream: *mut c_void,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    assert_eq!((z, threads_x, threads_y, threads_z, shared), (1, super::THREADS, 1, 1, 0));
    assert!(extra.is_null() && !CURRENT.get().is_null());
    STREAM.set(stream as u64);
    let error = unsafe {
        let run = std::mem::transmute::<*mut c_void, Run>(function);
        run(*parameters, x, y, false)
    };
    if error.is_null() {
        0
    } else {
        LAUNCH_FAILED
    }
}

const COMPILER: CompilerFunctions = CompilerFunctions {
    error_string: compiler_error,
    version: compiler_version,
    architecture_count,
    architectures,
    create,
    compile,
    destroy,
    log_size,
    log,
    cubin_size: image_size,
    cubin: image,
    ptx_size: image_size,
    ptx: image,
};

/// A program between its creation and its end.
struct Created {
    source: String,
    log: Vec<u8>,
    image: Vec<u8>,
}

unsafe extern "C" fn compiler_error(_: c_int) -> *const c_char {
    c"NVRTC_ERROR_COMPILATION".as_ptr()
}

unsafe extern "C" fn compiler_version(major: *mut c_int, minor: *mut c_int) -> c_int {
    unsafe { (*major, *minor) = (13, 0) };
    0
}

unsafe extern "C" fn architecture_count(count: *mut c_int) -> c_int {
    unsafe { *count = 3 };
    0
}

unsafe extern "C" fn architectures(known: *mut c_int) -> c_int {
    unsafe { std::slice::from_raw_parts_mut(known, 3) }.copy_from_slice(&[80, 90, 100]);
    0
}

unsafe extern "C" fn create(
    handle: *mut *mut c_void,
    source: *const c_char,
    _: *const c_char,
    headers: c_int,
    _: *const *const c_char,
    _: *const *const c_char,
) -> c_int {
    assert_eq!(headers, 0);
    let source = unsafe { CStr::from_ptr(source) }.to_str().unwrap().to_owned();
    let created = Created { source, log: Vec::new(), image: Vec::new() };
    unsafe { *handle = Box::into_raw(Box::new(created)).cast() };
    0
}

unsafe extern "C" fn compile(handle: *mut c_void, count: c_int, options: *const *const c_char) -> c_int {
    let number = COMPILATIONS.fetch_add(1, Ordering::Relaxed);
    let created = unsafe { &mut *handle.cast::<Created>() };
    let options = unsafe { std::slice::from_raw_parts(options, count as usize) };
    let options = options.iter().map(|&option| unsafe { CStr::from_ptr(option) }.to_str().unwrap());
    let is_ptx = options.clone().any(|option| option.starts_with("--gpu-architecture=compute_"));
    let defines = options.filter_map(|option| option.strip_prefix("--define-macro="));
    let defines = defines.map(|define| format!("#define {}\n", define.replace('=', " ")));
    let kernels = created.source.split("__launch_bounds__(THREADS) ").skip(1).map(|rest| {
        let (name, rest) = rest.split_once("(const ").unwrap();
        format!("EXPORT({name}, {})\n", rest.split_once(' ').unwrap().0)
    });
    let text = ["#include \"shim.hpp\"\n".to_owned()].into_iter().chain(defines).chain([created.source.clone()]);
    let text = text.chain(kernels).collect::<String>();

    let path = std::env::temp_dir().join(format!("cat-rs-fake-kernel-{}-{number}", process::id()));
    let (source, library) = (path.with_extension("cpp"), path.with_extension(if is_ptx { "ptx" } else { "so" }));
    fs::write(&source, text).unwrap();
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda");
    let options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-I", include];
    let done = Command::new("c++").args(options).arg(&source).arg("-o").arg(&library).output().unwrap();
    let _ = fs::remove_file(source);
    created.log = [done.stderr, vec![0]].concat();
    created.image = [library.to_str().unwrap().as_bytes(), &[0]].concat();
    LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner).push(library);
    if done.status.success() {
        0
    } else {
        COMPILATION
    }
}

unsafe extern "C" fn destroy(handle: *mut *mut c_void) -> c_int {
    drop(unsafe { Box::from_raw((*handle).cast::<Created>()) });
    0
}

unsafe extern "C" fn log_size(handle: *mut c_void, size: *mut usize) -> c_int {
    unsafe { *size = (*handle.cast::<Created>()).log.len() };
    0
}

unsafe extern "C" fn log(handle: *mut c_void, to: *mut c_char) -> c_int {
    let log = unsafe { &(*handle.cast::<Created>()).log };
    unsafe { std::ptr::copy_nonoverlapping(log.as_ptr(), to.cast(), log.len()) };
    0
}

unsafe extern "C" fn image_size(handle: *mut c_void, size: *mut usize) -> c_int {
    unsafe { *size = (*handle.cast::<Created>()).image.len() };
    0
}

unsafe extern "C" fn image(handle: *mut c_void, to: *mut c_char) -> c_int {
    let image = unsafe { &(*handle.cast::<Created>()).image };
    unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), to.cast(), image.len()) };
    0
}
