//! Records the PyTorch version that the crate is built against; the Python package compares it at import.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=VIRTUAL_ENV");
    println!("cargo::rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    // The interpreter that torch-sys asks for its headers, so that both see one PyTorch.
    let python = if std::env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    match torch_version(python) {
        Ok(version) => println!("cargo::rustc-env=CAT_RS_TORCH={version}"),
        Err(reason) => println!("cargo::error=cannot ask `{python}` for its PyTorch version: {reason}"),
    }
}

fn torch_version(python: &str) -> Result<String, String> {
    let output = Command::new(python)
        .args(["-c", "import torch; print(torch.__version__)"])
        .output()
        .map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let version = text(&output.stdout);
    if output.status.success() && !version.is_empty() {
        return Ok(version);
    }
    // The last line of a traceback is the error itself.
    Err(text(&output.stderr).lines().last().unwrap_or("it printed nothing").to_owned())
}
