//! Records the PyTorch version that the crate is built against; the Python package compares it at import.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=VIRTUAL_ENV");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // The interpreter that torch-sys asks for its headers, so that both see one PyTorch.
    let python = if std::env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let version = Command::new(python)
        .args(["-c", "import torch; print(torch.__version__)"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok());
    match version {
        Some(version) => println!("cargo:rustc-env=CAT_RS_TORCH={}", version.trim()),
        None => println!("cargo:rustc-env=CAT_RS_TORCH=unknown"),
    }
}
