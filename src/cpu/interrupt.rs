//! Long loops that somebody may stop, as Ctrl-C does.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long a loop runs before it asks, and from one question to the next.
const INTERVAL: Duration = Duration::from_millis(100);
/// Tasks from one look at the clock to the next.
const TASKS: u32 = 16;

thread_local! {
    static WATCH: Cell<Option<Watch>> = const { Cell::new(None) };
}

#[derive(Clone, Copy)]
struct Watch {
    stop: fn() -> bool,
    tasks: u32,
    asked: Option<Instant>,
}

/// Runs `work`, whose loops on this thread ask `stop` now and then whether to end, once it has taken a while.
pub fn interruptible<T>(stop: fn() -> bool, work: impl FnOnce() -> T) -> T {
    /// Ends the watch also where `work` panics.
    struct Guard(Option<Watch>);
    impl Drop for Guard {
        fn drop(&mut self) {
            WATCH.set(self.0);
        }
    }
    let _guard = Guard(WATCH.replace(Some(Watch { stop, tasks: 0, asked: None })));
    work()
}

/// Whether the loop is to end: asked after each task on the thread that called [`interruptible`], elsewhere never.
pub fn is_interrupted() -> bool {
    let Some(mut watch) = WATCH.get() else { return false };
    watch.tasks += 1;
    let mut stop = false;
    if watch.tasks == TASKS {
        watch.tasks = 0;
        let now = Instant::now();
        let asked = *watch.asked.get_or_insert(now);
        if now.duration_since(asked) > INTERVAL {
            watch.asked = Some(now);
            stop = (watch.stop)();
        }
    }
    WATCH.set(Some(watch));
    stop
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::for_each_task;

    #[test]
    fn a_loop_ends_when_it_is_asked_to() {
        for threads in [1, 2] {
            let run = || for_each_task("op", threads, usize::MAX, |_| std::thread::sleep(Duration::from_micros(100)));
            let error = interruptible(|| true, run).unwrap_err();
            assert_eq!(error.to_string(), "op: interrupted");
        }
        assert!(for_each_task("op", 2, 100, |_| ()).is_ok());
    }
}
