//! The CUDA driver: contexts, modules, launches.
//!
//! Of the instance of the library that PyTorch runs on, libcuda.so.1. Bindings that look for libcuda.so first, as those
//! of the cudarc crate do, find another one on WSL and beside a toolkit's stubs.

use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::ptr;

use super::library::{functions, Library};
use crate::error::{CatError, Result};

functions! {
    /// What is used of the driver.
    DriverFunctions {
        error_name = c"cuGetErrorName"(c_int, *mut *const c_char) -> c_int;
        error_string = c"cuGetErrorString"(c_int, *mut *const c_char) -> c_int;
        version = c"cuDriverGetVersion"(*mut c_int) -> c_int;
        device = c"cuDeviceGet"(*mut c_int, c_int) -> c_int;
        device_attribute = c"cuDeviceGetAttribute"(*mut c_int, c_int, c_int) -> c_int;
        retain_primary_context = c"cuDevicePrimaryCtxRetain"(*mut *mut c_void, c_int) -> c_int;
        current_context = c"cuCtxGetCurrent"(*mut *mut c_void) -> c_int;
        set_current_context = c"cuCtxSetCurrent"(*mut c_void) -> c_int;
        load_module = c"cuModuleLoadData"(*mut *mut c_void, *const c_void) -> c_int;
        function = c"cuModuleGetFunction"(*mut *mut c_void, *mut c_void, *const c_char) -> c_int;
        launch = c"cuLaunchKernel"(
            *mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void,
            *mut *mut c_void
        ) -> c_int;
    }
}

// Of CUdevice_attribute.
const MULTIPROCESSORS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;

/// The driver of this process.
#[derive(Clone, Copy, Debug)]
pub struct Driver(DriverFunctions);

/// What kernels need to know of a device that PyTorch uses.
#[derive(Clone, Copy, Debug)]
pub struct DeviceProperties {
    /// Its primary context, which is PyTorch's.
    context: Handle,
    /// Compute capability, 90 for 9.0.
    pub architecture: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

/// An object of the driver's: a context, a module or a function. It lives as long as the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle(*mut c_void);

// SAFETY: the driver's objects may be used from every thread.
unsafe impl Send for Handle {}

/// What a launch is made of, beside the function.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks: x, y.
    pub blocks: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// A stream of the device's primary context, as PyTorch gives it; 0 is the default one.
    pub stream: u64,
}

impl Driver {
    /// The driver that PyTorch runs on.
    pub fn find() -> std::result::Result<Self, String> {
        let missing = "no NVIDIA driver was found (libcuda.so.1)";
        DriverFunctions::of(&Library::find(c"libcuda.so.1").ok_or(missing)?).map(Self)
    }

    /// A driver of these functions.
    #[cfg(test)]
    pub fn of(functions: DriverFunctions) -> Self {
        Self(functions)
    }

    /// The newest CUDA version that the driver supports, 13000 for 13.0.
    pub fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: writes one integer.
        self.check("info", "cuDriverGetVersion", unsafe { (self.0.version)(&raw mut version) })?;
        Ok(version)
    }

    /// The properties of PyTorch's device of that index.
    pub fn device(&self, op: &'static str, index: usize) -> Result<DeviceProperties> {
        let (mut device, mut context) = (0, ptr::null_mut());
        let ordinal = c_int::try_from(index).unwrap_or(c_int::MAX);
        // SAFETY: both write one value. The context is PyTorch's, which never gives it back either.
        unsafe {
            self.check(op, "cuDeviceGet", (self.0.device)(&raw mut device, ordinal))?;
            let status = (self.0.retain_primary_context)(&raw mut context, device);
            self.check(op, "cuDevicePrimaryCtxRetain", status)?;
        }
        let attribute = |name| {
            let mut value = 0;
            // SAFETY: writes one integer.
            let status = unsafe { (self.0.device_attribute)(&raw mut value, name, device) };
            self.check(op, "cuDeviceGetAttribute", status)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        Ok(DeviceProperties {
            context: Handle(context),
            architecture: 10 * attribute(CAPABILITY_MAJOR)? + attribute(CAPABILITY_MINOR)?,
            multiprocessors: attribute(MULTIPROCESSORS)?.max(1),
        })
    }

    /// Makes the device's context this thread's current one until the guard goes.
    pub fn enter(&self, op: &'static str, device: &DeviceProperties) -> Result<ContextGuard<'_>> {
        let mut current = ptr::null_mut();
        // SAFETY: writes one pointer.
        self.check(op, "cuCtxGetCurrent", unsafe { (self.0.current_context)(&raw mut current) })?;
        if current == device.context.0 {
            return Ok(ContextGuard { driver: self, previous: None });
        }
        // SAFETY: a context that is never given back.
        let status = unsafe { (self.0.set_current_context)(device.context.0) };
        self.check(op, "cuCtxSetCurrent", status)?;
        Ok(ContextGuard { driver: self, previous: Some(Handle(current)) })
    }

    /// Loads compiled code into the current context.
    pub fn load_module(&self, op: &'static str, image: &[u8]) -> Result<Handle> {
        let mut module = ptr::null_mut();
        // SAFETY: the image is a whole cubin, which tells its own length, or PTX with a zero at its end.
        let status = unsafe { (self.0.load_module)(&raw mut module, image.as_ptr().cast()) };
        self.check(op, "cuModuleLoadData", status)?;
        Ok(Handle(module))
    }

    /// A kernel of a module.
    pub fn function(&self, op: &'static str, module: Handle, name: &CStr) -> Result<Handle> {
        let mut function = ptr::null_mut();
        // SAFETY: a loaded module and a C string.
        let status = unsafe { (self.0.function)(&raw mut function, module.0, name.as_ptr()) };
        self.check(op, "cuModuleGetFunction", status)?;
        Ok(Handle(function))
    }

    /// Launches a kernel whose one parameter is `problem`.
    ///
    /// # Safety
    /// `problem` has the layout of the kernel's parameter, and the addresses in it are of memory of the current
    /// context's device that lives until the kernel is done.
    pub unsafe fn launch<P: Copy>(
        &self,
        op: &'static str,
        function: Handle,
        launch: Launch,
        problem: &P,
    ) -> Result<()> {
        let Launch { blocks: [x, y], threads, stream } = launch;
        let mut parameters = [ptr::from_ref(problem).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the parameter before it returns.
        let status = unsafe {
            (self.0.launch)(
                function.0,
                x,
                y,
                1,
                threads,
                1,
                1,
                0,
                stream as *mut c_void,
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.check(op, "cuLaunchKernel", status)
    }

    fn check(&self, op: &'static str, call: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let text = |describe: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = ptr::null();
            // SAFETY: leaves a pointer to a constant of the driver's, or null for a code that it does not know.
            unsafe {
                if describe(status, &raw mut text) != 0 || text.is_null() {
                    return "unknown".to_owned();
                }
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        let (name, description) = (text(self.0.error_name), text(self.0.error_string));
        Err(CatError::cuda(op, format!("{call} failed with {name} ({status}): {description}")))
    }
}

/// Restores the context that was current before.
#[derive(Debug)]
pub struct ContextGuard<'d> {
    driver: &'d Driver,
    previous: Option<Handle>,
}

impl Drop for ContextGuard<'_> {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // SAFETY: it was current before, or there was none.
            unsafe { (self.driver.0.set_current_context)(previous.0) };
        }
    }
}
