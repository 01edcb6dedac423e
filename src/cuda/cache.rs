//! Compiled kernels in the user's cache folder.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};

/// Bytes of the checksum that a file begins with.
const CHECKSUM: usize = 32;

/// A folder of compiled kernels, named by what they were compiled from. Without a folder nothing is kept: a kernel is
/// then compiled once a process.
#[derive(Debug)]
pub struct Cache(Option<PathBuf>);

impl Cache {
    /// $XDG_CACHE_HOME/cat-rs/kernels, by default ~/.cache/cat-rs/kernels.
    pub fn of_the_user() -> Self {
        let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let root = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        Self(root.map(|root| root.join("cat-rs").join("kernels")))
    }

    /// A cache in that folder.
    #[cfg(test)]
    pub fn of(folder: PathBuf) -> Self {
        Self(Some(folder))
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        let name: String = Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        self.0.as_ref().map(|folder| folder.join(name))
    }

    /// What was kept under the key; `None` where there is nothing, or a file that is not whole.
    pub fn read(&self, key: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(key)?).ok()?;
        let (checksum, image) = bytes.split_at_checked(CHECKSUM)?;
        (checksum == Sha256::digest(image).as_slice()).then(|| image.to_vec())
    }

    /// Keeps an image, if the folder can be written to.
    pub fn write(&self, key: &str, image: &[u8]) {
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let Some(path) = self.path(key) else { return };
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        // Another process may write the same file: each writes its own, and the last one to rename it wins.
        let unfinished = path.with_extension(format!("{}-{number}.unfinished", process::id()));
        let bytes = [Sha256::digest(image).as_slice(), image].concat();
        let made = path.parent().is_some_and(|folder| fs::create_dir_all(folder).is_ok());
        if made && (fs::write(&unfinished, bytes).is_err() || fs::rename(&unfinished, &path).is_err()) {
            let _ = fs::remove_file(&unfinished);
        }
    }
}
