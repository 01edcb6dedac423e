"""Imports go one way: what each part of the crate and of the package may use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cat_rs

ROOT = Path(__file__).parent.parent
CRATE = ROOT / "src"
PACKAGE = Path(cat_rs.__file__).parent
HEAVY = ("peft", "diffusers", "transformers", "accelerate", "matplotlib", "tensorboard", "PIL", "yaml", "safetensors")


def rust_files(folder: Path = CRATE) -> list[Path]:
    files = sorted(folder.rglob("*.rs"))
    assert files, f"no Rust files under {folder}"
    return files


def code_of(file: Path) -> str:
    """A Rust file without comments and without its tests."""
    text = file.read_text().split("#[cfg(test)]")[0]
    return re.sub(r"//.*", "", text)


def imports(file: Path, *, at_import: bool = False) -> Iterator[str]:
    """Modules that a Python file imports, those under TYPE_CHECKING aside; ``at_import`` leaves functions out."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module or ""
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)) or (
                at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            ):
                continue
            else:
                yield from visit(child)

    yield from visit(ast.parse(file.read_text()))


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def test_only_the_binding_knows_python() -> None:
    for file in rust_files():
        if file.relative_to(CRATE).parts[0] != "python":
            assert not re.search(r"\b(pyo3|pyo3_tch|numpy|PyErr|PyResult)\b", code_of(file)), file


def test_cpu_kernels_and_the_cuda_driver_see_no_tensors() -> None:
    for file in [*CRATE.glob("ops/*/cpu.rs"), *rust_files(CRATE / "cpu"), *rust_files(CRATE / "cuda")]:
        assert not re.search(r"\b(tch|torch_sys|Tensor)\b", code_of(file)), file


def test_rust_imports_go_one_way() -> None:
    # python -> ops -> tensor, cpu, cuda, error; python -> adapter_file -> tensor, error
    may_use = {
        "error.rs": {"error"},
        "cpu": {"cpu", "error"},
        "cuda": {"cuda", "error"},
        "tensor.rs": {"tensor", "cpu", "error"},
        "ops": {"ops", "tensor", "cpu", "cuda", "error"},
        "adapter_file": {"adapter_file", "tensor", "error"},
    }
    for file in rust_files():
        part = file.relative_to(CRATE).parts[0]
        if part in may_use:
            used = set(re.findall(r"\bcrate::(\w+)", code_of(file)))
            # `crate::Result` and the like would be an item of lib.rs.
            assert used <= may_use[part], f"{file} uses {used - may_use[part]}"


def test_an_operation_does_not_use_another() -> None:
    for file in CRATE.glob("ops/*/*.rs"):
        others = {folder.name for folder in (CRATE / "ops").iterdir() if folder.is_dir()} - {file.parent.name}
        used = set(re.findall(r"\b(?:super|ops)::(\w+)", code_of(file)))
        assert not used & others, f"{file} uses {used & others}"


def test_tchs_panicking_names_are_not_used() -> None:
    panicking = r"\.(matmul|mm|to_kind|contiguous|narrow|expand|reshape|view|kind|detach|addmm_|linear|tr|to_device)\("
    for file in rust_files():
        assert not re.search(panicking, code_of(file)), file


def test_only_native_imports_the_extension() -> None:
    for file in python_files():
        if name_of(file) != "_native.py":
            wanted = [module for module in imports(file) if module in ("cat_rs._core", "_core")]
            assert not wanted, file


def test_python_imports_go_one_way() -> None:
    below = {"errors", "ops", "device"}
    may_use = {
        "errors.py": set(),
        "device.py": set(),
        "nested.py": set(),
        "capture.py": {"errors", "nested"},
        "_native.py": {"_core"},
        "schedule.py": below,
        "distributed.py": {"errors"},
        "processes.py": {"errors", "options"},
        "optim.py": below | {"distributed"},
        "preservation_score.py": {"errors", "ops"},
        "peft.py": below | {"frozen_layers"},
        "prompts.py": below,
        "frozen_layers.py": {"ops"},
        "cat_factor.py": {"errors"},
        "denoiser.py": {"errors", "device"},
        "files.py": below | {"atomic", "_native", "_core"},
        "step.py": below | {"capture", "cat_factor", "denoiser", "distributed", "nested", "schedule", "optim", "peft"},
        "teacher_bank.py": below | {"atomic", "denoiser", "schedule", "peft"},
    }
    for name, allowed in may_use.items():
        used = set()
        for module in imports(PACKAGE / name):
            parts = module.split(".")
            if parts[0] == "cat_rs" and len(parts) > 1:
                used.add(parts[1])
        assert used <= allowed, f"{name} uses {used - allowed}"


def test_an_operation_uses_none_but_what_all_share() -> None:
    for file in (PACKAGE / "ops").glob("*.py"):
        used = {module for module in imports(file) if module.startswith("cat_rs.ops.")}
        assert all(module.startswith("cat_rs.ops.operator") for module in used), f"{file} uses {used}"
        parts = {module.split(".")[1] for module in imports(file) if module.startswith("cat_rs.")}
        assert parts <= {"_native", "errors", "ops"}, f"{file} uses {parts}"


def test_operations_have_the_same_name_everywhere() -> None:
    operations = {folder.name for folder in (CRATE / "ops").iterdir() if folder.is_dir()}
    assert {file.stem for file in (PACKAGE / "ops").glob("*.py")} == operations | {"__init__", "operator"}
    assert {file.stem for file in (ROOT / "tests/ops").glob("test_*.py")} == {f"test_{name}" for name in operations}
    assert operations <= {file.stem for file in (CRATE / "python").glob("*.rs")}
    assert operations <= {file.stem for file in (ROOT / "benchmarks").glob("*.py")}


def test_the_extension_is_called_through_operations() -> None:
    may_call = ("ops/", "adapter_file/", "files.py", "info.py", "commands/info.py")
    for file in python_files():
        if "cat_rs._native._core" in set(imports(file)):
            assert name_of(file).startswith(may_call), file


def test_evaluations_need_no_training_and_no_report() -> None:
    may_use = {
        "evaluation",
        "errors",
        "options",
        "peft",
        "atomic",
        "files",
        "ops",
        "preservation_score",
        "processes",
        "prompts",
    }
    for file in (PACKAGE / "evaluation").glob("*.py"):
        parts = [module.split(".") for module in imports(file)]
        used = {part[1] for part in parts if part[0] == "cat_rs" and len(part) > 1}
        assert used <= may_use, f"{file} uses {used - may_use}"


def test_the_library_does_not_use_the_command_line() -> None:
    upper = ("cat_rs.cli", "cat_rs.commands")
    for file in python_files():
        if not name_of(file).startswith(("cli", "commands", "__main__")):
            assert not [module for module in imports(file) if module.startswith(upper)], file


def test_only_peft_py_imports_peft_at_import() -> None:
    for file in python_files():
        if name_of(file) != "peft.py":
            wanted = [module for module in imports(file, at_import=True) if module.split(".")[0] == "peft"]
            assert not wanted, file


def test_importing_needs_only_pytorch_and_numpy() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "import torch, cat_rs\n"
        "from cat_rs.errors import CatRsError\n"
        "cat_rs.CatStep, cat_rs.TeacherBank, cat_rs.FlatAdamW, cat_rs.kps, cat_rs.remove_trigger\n"
        "a = torch.ones(2, 3)\n"
        "assert cat_rs.cat_loss(a, a, a, a) == 0\n"
        "print(*sorted(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not {module.split(".")[0] for module in done.stdout.split()} & set(HEAVY)
