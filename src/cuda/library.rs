//! Shared libraries that may be missing, and tables of their functions.

use std::ffi::{c_int, c_void, CStr};

/// A loaded library; it stays loaded.
#[derive(Debug)]
pub struct Library(*mut c_void);

impl Library {
    /// The library of that name where the process has it already.
    pub fn loaded(name: &CStr) -> Option<Self> {
        Self::open(name, libc::RTLD_NOLOAD)
    }

    /// The library of that name where the system finds it.
    pub fn find(name: &CStr) -> Option<Self> {
        Self::open(name, 0)
    }

    fn open(name: &CStr, flags: c_int) -> Option<Self> {
        // SAFETY: the name is a C string; NVIDIA's libraries run no harmful code when they are loaded.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | flags) };
        (!handle.is_null()).then_some(Self(handle))
    }

    /// The address of a function.
    pub fn symbol(&self, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: the handle is of a library that stays loaded.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if address.is_null() {
            return Err(format!("the library is too old, it has no {}", name.to_string_lossy()));
        }
        Ok(address)
    }
}

/// A structure of a library's functions, by their C names and signatures.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $name {
            /// The functions of a library; an error names one that is missing.
            pub fn of(library: &$crate::cuda::library::Library) -> std::result::Result<Self, String> {
                // SAFETY: the signatures are those of the vendor's headers, under these names unchanged since CUDA 11.
                unsafe {
                    Ok(Self {
                        $($field: std::mem::transmute::<
                            *mut std::ffi::c_void,
                            unsafe extern "C" fn($($argument),*) -> $result,
                        >(library.symbol($symbol)?),)*
                    })
                }
            }
        }
    };
}
pub(crate) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    functions! {
        /// Of the C library.
        Present { length = c"strlen"(*const std::ffi::c_char) -> usize; }
    }
    functions! {
        /// Of no library.
        Absent { missing = c"no_such_function"() -> c_int; }
    }

    #[test]
    fn functions_are_those_of_the_library() {
        let library = Library::loaded(c"libc.so.6").unwrap();
        // SAFETY: a C string.
        assert_eq!(unsafe { (Present::of(&library).unwrap().length)(c"four".as_ptr()) }, 4);
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(Library::find(c"libno-such-library.so.1").is_none());
        assert!(Library::loaded(c"libno-such-library.so.1").is_none());
        let error = Absent::of(&Library::loaded(c"libc.so.6").unwrap()).map(|absent| absent.missing).unwrap_err();
        assert_eq!(error, "the library is too old, it has no no_such_function");
    }
}
