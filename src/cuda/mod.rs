//! Kernels on NVIDIA GPUs: compiled for the device at hand at first use, cached, launched on PyTorch's current stream.
//!
//! Nothing is linked: driver and compiler are those that PyTorch has loaded, and their absence is an error of the call
//! that needs them.

mod cache;
mod compiler;
mod driver;
#[cfg(test)]
pub mod fake;
mod library;

use std::ffi::CStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use self::cache::Cache;
use self::compiler::Compiler;
pub use self::compiler::TorchCuda;
use self::driver::{DeviceProperties, Driver, Handle, Launch};
use crate::error::{CatError, Result};

/// Threads of a block, of kernels that do not say otherwise: THREADS of common.cuh.
pub const THREADS: u32 = 256;
/// Blocks for each multiprocessor: enough that the last ones to finish are a small part of the time.
const BLOCKS: u64 = 32;

/// A macro and its value.
pub type Define = (&'static str, &'static str);

/// A source file of kernels.
#[derive(Debug)]
pub struct Program {
    /// Of the operation.
    pub name: &'static str,
    /// CUDA C++, after common.cuh.
    pub source: &'static str,
}

impl Program {
    /// The whole source.
    fn text(&self) -> String {
        [include_str!("common.cuh"), self.source].concat()
    }
}

/// A kernel of a program that is compiled with the dtypes of its tensors.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    /// Where it is written.
    pub program: &'static Program,
    /// Its dtypes.
    pub defines: &'a [Define],
    /// Its name.
    pub name: &'static CStr,
}

/// A program with dtypes, as it may be compiled.
#[derive(Debug)]
pub struct Variant {
    /// The program.
    pub program: &'static Program,
    /// Its dtypes.
    pub defines: Vec<Define>,
}

/// A number that a kernel takes from the host, or reads from the device: Scalar of common.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scalar {
    address: u64,
    is_f64: u64,
    value: f64,
}

impl Scalar {
    /// A number of the host.
    pub fn host(value: f64) -> Self {
        Self { address: 0, is_f64: 0, value }
    }

    /// The f32, or f64, at an address of the device.
    pub fn device(address: u64, is_f64: bool) -> Self {
        Self { address, is_f64: is_f64.into(), value: 0.0 }
    }
}

/// Driver and compiler of this process, and what they made.
#[derive(Debug)]
pub struct Toolkit {
    driver: Driver,
    compiler: Compiler,
    cache: Cache,
    devices: Mutex<Vec<(usize, DeviceProperties)>>,
    functions: Mutex<Vec<Loaded>>,
}

/// A kernel in a device's memory.
#[derive(Debug)]
struct Loaded {
    device: usize,
    program: &'static str,
    defines: Vec<Define>,
    name: &'static CStr,
    module: Handle,
    function: Handle,
}

impl Toolkit {
    /// Driver and compiler that PyTorch uses.
    fn find() -> std::result::Result<Self, String> {
        Ok(Self::new(Driver::find()?, Compiler::find()?, Cache::of_the_user()))
    }

    fn new(driver: Driver, compiler: Compiler, cache: Cache) -> Self {
        Self { driver, compiler, cache, devices: Mutex::default(), functions: Mutex::default() }
    }

    fn of_the_process(op: &'static str) -> Result<&'static Self> {
        static TOOLKIT: OnceLock<std::result::Result<Toolkit, String>> = OnceLock::new();
        TOOLKIT.get_or_init(Self::find).as_ref().map_err(|reason| CatError::cuda(op, reason))
    }

    /// A stream of PyTorch's device of that index.
    pub fn stream(&self, op: &'static str, device: usize, handle: u64) -> Result<Stream<'_>> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let known = devices.iter().find(|(index, _)| *index == device).map(|(_, properties)| *properties);
        let properties = match known {
            Some(properties) => properties,
            None => {
                let properties = self.driver.device(op, device)?;
                devices.push((device, properties));
                properties
            }
        };
        Ok(Stream { toolkit: self, op, device, properties, handle })
    }
}

/// A stream of a device, for the kernels of one operation.
#[derive(Debug)]
pub struct Stream<'t> {
    toolkit: &'t Toolkit,
    op: &'static str,
    device: usize,
    properties: DeviceProperties,
    handle: u64,
}

impl Stream<'static> {
    /// The stream of that handle, a raw CUstream; 0 is the default one of PyTorch's device of that index.
    pub fn new(op: &'static str, device: usize, handle: u64) -> Result<Self> {
        Toolkit::of_the_process(op)?.stream(op, device, handle)
    }
}

impl Stream<'_> {
    /// Blocks for a kernel that takes any number of them, and has so many pieces of work.
    pub fn blocks(&self, pieces: u64) -> u32 {
        let most = BLOCKS * u64::from(self.properties.multiprocessors);
        u32::try_from(pieces.clamp(1, most)).unwrap_or(u32::MAX)
    }

    /// Launches a kernel of blocks of [`THREADS`] threads.
    ///
    /// # Safety
    /// `problem` has the layout of the kernel's parameter, and the addresses in it are of this device's memory that
    /// lives until the kernel is done: PyTorch's allocator hands freed memory only to later work of the same stream.
    pub unsafe fn launch<P: Copy>(&self, kernel: Kernel, blocks: [u32; 2], problem: &P) -> Result<()> {
        let Self { toolkit, op, properties, handle: stream, .. } = *self;
        let _current = toolkit.driver.enter(op, &properties)?;
        let function = self.function(kernel)?;
        let launch = Launch { blocks, threads: THREADS, stream };
        // SAFETY: the caller's promise, in the device's context.
        unsafe { toolkit.driver.launch(op, function, launch, problem) }
    }

    /// The kernel in the memory of the device, whose context is current.
    fn function(&self, kernel: Kernel) -> Result<Handle> {
        let Kernel { program, defines, name } = kernel;
        let mut functions = self.toolkit.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |loaded: &&Loaded| {
            loaded.device == self.device && loaded.program == program.name && loaded.defines == defines
        };
        if let Some(loaded) = functions.iter().filter(same).find(|loaded| loaded.name == name) {
            return Ok(loaded.function);
        }
        let module = match functions.iter().find(same) {
            Some(loaded) => loaded.module,
            None => self.module(program, defines)?,
        };
        let function = self.toolkit.driver.function(self.op, module, name)?;
        let defines = defines.to_vec();
        functions.push(Loaded { device: self.device, program: program.name, defines, name, module, function });
        Ok(function)
    }

    fn module(&self, program: &'static Program, defines: &[Define]) -> Result<Handle> {
        let Toolkit { driver, compiler, cache, .. } = self.toolkit;
        let architecture = self.properties.architecture;
        let (options, _) = compiler.options(self.op, architecture)?;
        let versions = (compiler.version()?, driver.version()?, architecture);
        let key = format!("{versions:?} {options:?} {defines:?} {}", program.text());
        // What the driver refuses is as good as not there.
        let kept = cache.read(&key).and_then(|image| driver.load_module(self.op, &image).ok());
        if let Some(module) = kept {
            return Ok(module);
        }
        let image = compiler.compile(self.op, program, defines, architecture)?.image;
        let module = driver.load_module(self.op, &image)?;
        cache.write(&key, &image);
        Ok(module)
    }
}

/// Compiles programs, without a device, for one of this compute capability; returns each one's name and what the
/// compiler said.
pub fn compile(op: &'static str, variants: &[Variant], architecture: u32) -> Result<Vec<(String, String)>> {
    let compiler = Compiler::find().map_err(|reason| CatError::cuda(op, reason))?;
    let compiled = variants.iter().map(|Variant { program, defines }| {
        let compiled = compiler.compile(op, program, defines, architecture)?;
        Ok((program.name.to_owned(), compiled.log))
    });
    compiled.collect()
}

/// The CUDA version of the driver, "13.0", or why there is none.
pub fn driver_version() -> std::result::Result<String, String> {
    let version = Driver::find()?.version().map_err(|error| error.to_string())?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// The version of NVRTC, "13.0", or why there is none.
pub fn compiler_version() -> std::result::Result<String, String> {
    let (major, minor) = Compiler::find()?.version().map_err(|error| error.to_string())?;
    Ok(format!("{major}.{minor}"))
}

/// The compute capabilities that NVRTC compiles for, 90 for 9.0.
pub fn architectures(op: &'static str) -> Result<Vec<u32>> {
    Compiler::find().map_err(|reason| CatError::cuda(op, reason))?.architectures(op)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Doubles `count` floats.
    static DOUBLING: Program = Program {
        name: "doubling",
        source: "struct Work { f32* values; u64 count; };
extern \"C\" __global__ void __launch_bounds__(THREADS) doubling(const Work work) {
    for (u64 i = threadIdx.x; i < work.count; i += THREADS) work.values[i] *= FACTOR;
}",
    };
    static BROKEN: Program = Program { name: "broken", source: "this is no C++" };

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Work {
        values: *mut f32,
        count: u64,
    }

    fn run(stream: &Stream, factor: &'static str) -> Result<[f32; 3]> {
        let mut values = [1.0, 2.0, 3.0];
        let work = Work { values: values.as_mut_ptr(), count: 3 };
        let kernel = Kernel { program: &DOUBLING, defines: &[("FACTOR", factor)], name: c"doubling" };
        // SAFETY: the structure above.
        unsafe { stream.launch(kernel, [1, 1], &work)? };
        Ok(values)
    }

    #[test]
    fn a_kernel_runs_on_the_given_stream_and_is_compiled_once() {
        fake::alone(|toolkit| {
            let stream = toolkit.stream("op", 0, 42).unwrap();
            let before = fake::compilations();
            assert_eq!(run(&stream, "2").unwrap(), [2.0, 4.0, 6.0]);
            assert_eq!(run(&stream, "2").unwrap(), [2.0, 4.0, 6.0]);
            assert_eq!(fake::last_stream(), 42);
            assert_eq!(fake::compilations(), before + 1);
            assert_eq!(run(&stream, "3").unwrap(), [3.0, 6.0, 9.0]);
            assert_eq!(fake::compilations(), before + 2);
        });
    }

    #[test]
    fn the_devices_context_is_current_for_the_launch_alone() {
        fake::alone(|toolkit| {
            for current in [std::ptr::null_mut(), fake::context_of(0), fake::context_of(1)] {
                fake::set_current(current);
                for device in [0, 1] {
                    run(&toolkit.stream("op", device, 0).unwrap(), "2").unwrap();
                    assert_eq!(fake::current_context(), current);
                }
            }
        });
    }

    #[test]
    fn compiled_kernels_stay_on_disk() {
        fake::alone(|_| {
            let folder = fake::new_folder();
            let launch = || run(&fake::toolkit(folder.clone()).stream("op", 0, 0).unwrap(), "2");
            let before = fake::compilations();
            launch().unwrap();
            launch().unwrap();
            assert_eq!(fake::compilations(), before + 1);

            let files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
            let [file] = files.as_slice() else { panic!("one kernel, but {files:?}") };
            let whole = fs::read(file).unwrap();
            // Cut short, empty, another byte: compiled again, and whole afterwards.
            let mut other = whole.clone();
            *other.last_mut().unwrap() ^= 1;
            for damaged in [&whole[..20], &whole[..whole.len() - 1], &[], &other] {
                fs::write(file, damaged).unwrap();
                let before = fake::compilations();
                assert_eq!(launch().unwrap(), [2.0, 4.0, 6.0]);
                launch().unwrap();
                assert_eq!(fake::compilations(), before + 1);
            }
            // Whole, but nothing that the driver takes.
            Cache::of(folder.clone()).write("", b"/nothing/here\0");
            let foreign = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).find(|path| path != file);
            fs::rename(foreign.unwrap(), file).unwrap();
            let before = fake::compilations();
            assert_eq!(launch().unwrap(), [2.0, 4.0, 6.0]);
            assert_eq!(fake::compilations(), before + 1);
            // Another architecture is another kernel.
            fake::set_architecture(80);
            launch().unwrap();
            assert_eq!(fake::compilations(), before + 2);
            let _ = fs::remove_dir_all(folder);
        });
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_none() {
        fake::alone(|_| {
            let file = fake::new_folder();
            fs::write(&file, "").unwrap();
            let toolkit = fake::toolkit(file.join("kernels"));
            assert_eq!(run(&toolkit.stream("op", 0, 0).unwrap(), "2").unwrap(), [2.0, 4.0, 6.0]);
            let _ = fs::remove_file(file);
        });
    }

    #[test]
    fn devices_newer_than_the_compiler_get_what_they_can_run() {
        let compiler = fake::compiler();
        let target =
            |architecture| compiler.options("op", architecture).map(|(options, is_ptx)| (options[0].clone(), is_ptx));
        assert_eq!(target(90).unwrap(), ("--gpu-architecture=sm_90".into(), false));
        assert_eq!(target(89).unwrap(), ("--gpu-architecture=sm_80".into(), false));
        assert_eq!(target(103).unwrap(), ("--gpu-architecture=sm_100".into(), false));
        assert_eq!(target(120).unwrap(), ("--gpu-architecture=compute_100".into(), true));
        let error = target(75).unwrap_err().to_string();
        let expected = "op: CUDA: NVRTC does not compile for compute capability 7.5, but from 8.0 on: cat-rs info";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn failures_carry_cudas_own_words() {
        fake::alone(|toolkit| {
            let stream = toolkit.stream("op", 0, 0).unwrap();
            let launch = |program, name| {
                // SAFETY: the kernel is not reached.
                let launched =
                    unsafe { stream.launch(Kernel { program, defines: &[("FACTOR", "2")], name }, [1, 1], &0u64) };
                launched.unwrap_err().to_string()
            };
            let error = launch(&BROKEN, c"broken");
            assert!(error
                .starts_with("op: CUDA: nvrtcCompileProgram failed with NVRTC_ERROR_COMPILATION (6), of broken.cu: "));
            assert!(error.contains("this is no C++") || error.contains("does not name a type"), "{error}");
            let error = launch(&DOUBLING, c"tripling");
            assert_eq!(error, "op: CUDA: cuModuleGetFunction failed with OTHER (500): unknown");
            let error = toolkit.stream("op", 2, 0).unwrap_err().to_string();
            assert_eq!(error, "op: CUDA: cuDeviceGet failed with OTHER (101): unknown");
        });
    }

    #[test]
    fn a_failed_launch_is_an_error() {
        static WAITING: Program = Program {
            name: "waiting",
            source: "struct Work { f32* values; u64 count; };
extern \"C\" __global__ void __launch_bounds__(THREADS) waiting(const Work work) {
    if (threadIdx.x == 0) __syncthreads();
}",
        };
        fake::with_stream("op", |stream| {
            let kernel = Kernel { program: &WAITING, defines: &[], name: c"waiting" };
            let work = Work { values: std::ptr::null_mut(), count: 0 };
            // SAFETY: the structure above.
            let error = unsafe { stream.launch(kernel, [1, 1], &work) }.unwrap_err().to_string();
            let expected = "cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure";
            assert_eq!(error, format!("op: CUDA: {expected}"));
        });
    }
}
