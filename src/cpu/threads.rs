//! A pool that follows PyTorch's thread count.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{CatError, Result};

struct Pool {
    process: u32,
    helpers: usize,
    threads: Arc<ThreadPool>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

/// The pool with `helpers` workers; rebuilt when the count changes and after a fork, which copies no threads.
fn pool(op: &'static str, helpers: usize) -> Result<Arc<ThreadPool>> {
    let process = std::process::id();
    let mut current = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = current.as_ref() {
        if pool.process == process && pool.helpers == helpers {
            return Ok(pool.threads.clone());
        }
    }
    let threads = ThreadPoolBuilder::new()
        .num_threads(helpers)
        .thread_name(|index| format!("cat-rs-{index}"))
        .build()
        .map_err(|error| CatError::Threads { op, threads: helpers, message: error.to_string() })?;
    let threads = Arc::new(threads);
    if let Some(old) = current.replace(Pool { process, helpers, threads: threads.clone() }) {
        if old.process != process {
            // After a fork the old pool's threads do not exist: joining them would wait for ever.
            std::mem::forget(old);
        }
    }
    Ok(threads)
}

/// Runs `task(0) .. task(count - 1)`, each once, on up to `threads` threads, the caller's among them.
///
/// Which thread runs which task is not fixed, so a task writes only what is its own.
pub fn for_each_task(op: &'static str, threads: usize, count: usize, task: impl Fn(usize) + Sync) -> Result<()> {
    let helpers = NonZeroUsize::new(threads.min(count).saturating_sub(1));
    let Some(helpers) = helpers else {
        (0..count).for_each(task);
        return Ok(());
    };
    let next = AtomicUsize::new(0);
    let work = || loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= count {
            break;
        }
        task(index);
    };
    let pool = pool(op, threads.saturating_sub(1))?;
    pool.in_place_scope(|scope| {
        for _ in 0..helpers.get() {
            scope.spawn(|_| work());
        }
        work();
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_thread_count() {
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
}
