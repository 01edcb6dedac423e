//! Parallel loops on the threads that PyTorch itself uses.
//!
//! libtorch's CPU operations run on an OpenMP runtime whose workers stay awake between operations. Running on the
//! same workers costs no wake-up, and no second pool competes with them for the cores.

use std::any::Any;
use std::ffi::{c_uint, c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::interrupt::is_interrupted;
use crate::error::{CatError, Result};

/// Runs `body(data)` once on each of `threads` threads of the runtime (libgomp's ABI, which LLVM's and Intel's
/// runtimes provide too).
type Parallel =
    unsafe extern "C" fn(body: extern "C" fn(*mut c_void), data: *mut c_void, threads: c_uint, flags: c_uint);

const RUNTIMES: [&CStr; 3] = [c"libgomp.so.1", c"libiomp5.so", c"libomp.so"];

/// The entry point of the OpenMP runtime that is already loaded with libtorch, and the process it belongs to.
struct Runtime {
    parallel: Option<Parallel>,
    process: u32,
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime { parallel: find_parallel(), process: process::id() })
}

fn find_parallel() -> Option<Parallel> {
    // SAFETY: RTLD_NOLOAD only finds libraries that are loaded already, and the symbol has the ABI of `Parallel`.
    unsafe {
        let loaded = RUNTIMES.iter().map(|name| libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD));
        let handles = std::iter::once(libc::RTLD_DEFAULT).chain(loaded.filter(|handle| !handle.is_null()));
        let mut symbols = handles.map(|handle| libc::dlsym(handle, c"GOMP_parallel".as_ptr()));
        symbols.find(|symbol| !symbol.is_null()).map(|symbol| std::mem::transmute::<*mut c_void, Parallel>(symbol))
    }
}

/// What the threads of one loop share.
struct Loop<'a> {
    next: AtomicUsize,
    count: usize,
    task: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    interrupted: AtomicBool,
}

impl Loop<'_> {
    /// Takes tasks until none is left.
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                return;
            }
            (self.task)(index);
            if is_interrupted() {
                self.interrupted.store(true, Ordering::Relaxed);
                return self.end();
            }
        }
    }

    /// Leaves no task to take.
    fn end(&self) {
        self.next.store(self.count, Ordering::Relaxed);
    }
}

extern "C" fn work(data: *mut c_void) {
    // SAFETY: `for_each_task` passes a `Loop` that outlives the parallel region.
    let tasks = unsafe { &*data.cast::<Loop>() };
    // A panic must not unwind through the runtime's C frames.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| tasks.work())) {
        tasks.end();
        *tasks.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}

/// Runs `task(0) .. task(count - 1)`, each once, on up to `threads` threads, the caller's among them.
///
/// Which thread runs which task is not fixed, so a task writes only what is its own. After a fork the runtime's
/// workers do not exist: a forked child runs its tasks on its own thread. Within [`super::interrupt::interruptible`] the
/// loop may end early, with an error.
pub fn for_each_task(op: &'static str, threads: usize, count: usize, task: impl Fn(usize) + Sync) -> Result<()> {
    let runtime = runtime();
    let threads = threads.min(count);
    let parallel = runtime.parallel.filter(|_| threads > 1 && runtime.process == process::id());
    let Some(parallel) = parallel else {
        let interrupted = (0..count).any(|index| {
            task(index);
            is_interrupted()
        });
        return if interrupted { Err(CatError::Interrupted { op }) } else { Ok(()) };
    };
    let tasks = Loop {
        next: AtomicUsize::new(0),
        count,
        task: &task,
        panic: Mutex::new(None),
        interrupted: AtomicBool::new(false),
    };
    let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
    // SAFETY: the region ends before `tasks` goes, and `work` shares it only through atomics and locks.
    unsafe { parallel(work, (&raw const tasks).cast_mut().cast(), threads, 0) };
    match tasks.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        None if tasks.interrupted.into_inner() => Err(CatError::Interrupted { op }),
        None => Ok(()),
        Some(panic) => {
            let message = panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a task panicked".into());
            Err(CatError::Kernel { op, message })
        }
    }
}

/// Whether loops can run on PyTorch's threads: whether its OpenMP runtime was found.
pub fn parallel_available() -> bool {
    runtime().parallel.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_thread_count() {
        assert!(parallel_available());
        for threads in [1, 2, 3, 8] {
            for count in [0, 1, 2, 7, 1000] {
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                for_each_task("test", threads, count, |index| {
                    runs[index].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(runs.iter().all(|run| run.load(Ordering::Relaxed) == 1), "{threads} threads, {count} tasks");
            }
        }
    }

    #[test]
    fn a_panicking_task_is_an_error() {
        let error = for_each_task("test", 2, 64, |index| assert!(index != 40, "task {index} failed")).unwrap_err();
        assert!(error.to_string().contains("task 40 failed"), "{error}");
    }
}
