"""Imports go one way: what each part of the crate and of the package may use."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def import_statements(file: Path, *, at_import: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports of a Python file, those under TYPE_CHECKING aside; ``at_import`` leaves functions out."""

    def visit(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child
            elif (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)) or (
                at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            ):
                continue
            else:
                yield from visit(child)

    yield from visit(ast.parse(file.read_text()))


def imports(file: Path, *, at_import: bool = False) -> Iterator[str]:
    """Modules that a Python file imports, and what it imports from them, as dotted names."""
    for statement in import_statements(file, at_import=at_import):
        if isinstance(statement, ast.ImportFrom):
            yield statement.module or ""
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        else:
            yield from (alias.name for alias in statement.names)


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@functools.cache
def module_graph() -> dict[str, set[str]]:
    """Each module of the package -> those that it imports anywhere, also inside functions; both as dotted names."""

    def dotted(file: Path) -> str:
        return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")

    def targets(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
        for alias in statement.names:
            # A name may be a module of a package, or something that the package's own file defines.
            name = f"{statement.module}.{alias.name}" if isinstance(statement, ast.ImportFrom) else alias.name
            yield name if name in modules or name == "cat_rs._core" else name.rpartition(".")[0]

    modules = {dotted(file): file for file in python_files()}
    return {
        name: {target for statement in import_statements(file) for target in targets(statement) if target in modules}
        for name, file in modules.items()
    }


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


def test_tensors_come_from_python_and_to_addresses_through_one_door() -> None:
    for file in rust_files():
        if file.name != "convert.rs":
            assert "pyo3_tch" not in code_of(file), file
        if file.name != "tensor.rs":
            assert not re.search(r"\b(at_)?data_ptr\b|copy_data", code_of(file)), file


def test_only_native_imports_the_extension() -> None:
    for file in python_files():
        if name_of(file) != "_native.py":
            wanted = [module for module in imports(file) if module in ("cat_rs._core", "_core")]
            assert not wanted, file


def test_python_imports_go_one_way() -> None:
    below = {"errors", "ops", "arguments"}
    may_use = {
        "errors.py": set(),
        "arguments.py": {"errors"},
        "_native.py": {"_core", "composed"},
        "dtypes.py": set(),
        "_version.py": set(),
        "options.py": {"errors", "text_files"},
        "processes.py": {"errors", "options"},
        "run_folder.py": {"errors", "text_files"},
        "preservation_score.py": below,
        "peft.py": below | {"dtypes", "frozen_layers", "unwrap"},
        "folding.py": set(),
        "prompts.py": {"errors", "folding"},
        "text_files.py": {"errors"},
        "frozen_layers.py": {"ops"},
        "image_files.py": {"errors"},
        "atomic.py": set(),
        "unwrap.py": set(),
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
        assert parts <= {"_native", "arguments", "errors", "ops"}, f"{file} uses {parts}"


def test_what_runs_without_an_extension_needs_only_the_ground() -> None:
    used = parts_used("composed")
    assert used <= {"arguments", "dtypes", "errors"}, used


def test_operations_have_the_same_name_everywhere() -> None:
    operations = {folder.name for folder in (CRATE / "ops").iterdir() if folder.is_dir()}
    assert {file.stem for file in (PACKAGE / "ops").glob("*.py")} == operations | {"__init__", "operator"}
    others = {"__init__", "adapter_file", "checks", "names"}
    assert {file.stem for file in (PACKAGE / "composed").glob("*.py")} == operations | others
    assert {file.stem for file in (ROOT / "tests/ops").glob("test_*.py")} == {f"test_{name}" for name in operations}
    assert operations <= {file.stem for file in (CRATE / "python").glob("*.rs")}
    assert operations <= {file.stem for file in (ROOT / "benchmarks").glob("*.py")}


def test_the_extension_is_called_through_operations() -> None:
    may_call = ("ops/", "adapter_file/", "commands/info.py")
    for file in python_files():
        if "cat_rs._native._core" in set(imports(file)):
            assert name_of(file).startswith(may_call), file


# From below; a module uses only floors below its own.
STEP_FLOORS = (
    "pytree device_values accumulation collectives cat_factor preservation",
    "denoiser noise_schedule cuda_graphs flat_buffers",
    "optimizer",
    "adapters",
    "conditions",
    "inputs",
    "teacher_bank captured_step",
    "cat_step",
)
ADAPTER_FILE_FLOORS = (
    "paths disk",
    "layer",
    "lora_config metadata update",
    "model",
    "lora_file",
    "read save pipeline",
    "merge",
)
EVALUATION_FLOORS = (
    "errors config measures",
    "fingerprint pictures prompts generation records scores front",
    "encoder disk_cache result",
    "distributed kps_evaluator",
    "task",
    "batches",
    "adapter_evaluation live_evaluation",
)
ADAPTER_CHECK_FLOORS = (
    "trigger weights",
    "prompts result",
    "pictures stack",
    "wording",
    "checking",
)
REPORT_FLOORS = (
    "style wording picture_files",
    "charts table checks",
    "curves fronts sheet check_charts",
    "sources",
    "content",
    "html overview",
    "writer",
)


def parts_used(package: str) -> set[str]:
    """The modules and packages directly under cat_rs that a package uses, without itself."""
    folder = f"cat_rs.{package}"
    used = {
        target.split(".")[1]
        for name, targets in module_graph().items()
        if name == folder or name.startswith(f"{folder}.")
        for target in targets
        if target != "cat_rs"
    }
    return used - {package}


@pytest.mark.parametrize(
    ("package", "floors"),
    [
        ("adapter_file", ADAPTER_FILE_FLOORS),
        ("step", STEP_FLOORS),
        ("evaluation", EVALUATION_FLOORS),
        ("adapter_check", ADAPTER_CHECK_FLOORS),
        ("report", REPORT_FLOORS),
    ],
)
def test_modules_of_a_package_use_only_floors_below(package: str, floors: tuple[str, ...]) -> None:
    floor_of = {name: number for number, names in enumerate(floors) for name in names.split()}
    assert set(floor_of) == {file.stem for file in (PACKAGE / package).glob("*.py")} - {"__init__"}
    graph = module_graph()
    for name, floor in floor_of.items():
        targets = graph[f"cat_rs.{package}.{name}"]
        assert f"cat_rs.{package}" not in targets, f"{package}/{name}.py uses its package's own file"
        used = {target.rpartition(".")[2] for target in targets if target.startswith(f"cat_rs.{package}.")}
        higher = {other for other in used if floor_of[other] >= floor}
        assert not higher, f"{package}/{name}.py uses {higher}"


def test_a_step_needs_no_training_and_no_evaluation() -> None:
    used = parts_used("step")
    assert used <= {"arguments", "dtypes", "errors", "ops", "unwrap", "adapter_file", "peft"}, used


def test_adapter_files_need_only_the_ground() -> None:
    used = parts_used("adapter_file")
    assert used <= {"arguments", "errors", "atomic", "_native", "unwrap", "text_files"}, used


def test_evaluations_need_no_training_and_no_report() -> None:
    used = parts_used("evaluation")
    assert used <= {
        "arguments",
        "errors",
        "hub",
        "options",
        "peft",
        "atomic",
        "adapter_file",
        "image_files",
        "ops",
        "preservation_score",
        "processes",
        "prompts",
        "text_files",
    }, used


def test_checks_need_no_training_and_no_report() -> None:
    used = parts_used("adapter_check")
    may_use = {"adapter_file", "arguments", "atomic", "evaluation", "errors", "ops", "processes", "prompts"}
    may_use |= {"text_files"}
    assert used <= may_use, used - may_use


def test_reports_need_no_training_and_no_model() -> None:
    used = parts_used("report")
    may_use = {"errors", "options", "atomic", "image_files", "run_folder", "adapter_check", "evaluation", "text_files"}
    assert used <= may_use, used - may_use


def test_training_needs_no_report() -> None:
    may_use = {"evaluation", "errors", "_version", "options", "processes", "run_folder", "image_files"}
    may_use |= {"arguments", "atomic", "hub", "adapter_file", "prompts", "step", "text_files"}
    used = parts_used("training")
    assert used <= may_use, used - may_use


def test_python_imports_form_no_circle() -> None:
    try:
        graphlib.TopologicalSorter(module_graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    "package", ["cat_rs", "cat_rs.adapter_check", "cat_rs.evaluation", "cat_rs.report", "cat_rs.training"]
)
def test_no_module_has_the_name_of_a_function(package: str) -> None:
    module = importlib.import_module(package)
    folder = Path(str(module.__file__)).parent
    stems = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    functions = {name for name in module.__all__ if callable(getattr(module, name))}
    assert not stems & functions


def test_only_the_command_line_imports_the_package_itself() -> None:
    for name, targets in module_graph().items():
        if not name.startswith("cat_rs.commands."):
            assert "cat_rs" not in targets, f"{name}: import the module that defines the name"


def test_the_command_line_is_the_top_floor() -> None:
    for file in (PACKAGE / "commands").glob("*.py"):
        others = [module for module in imports(file) if module.startswith("cat_rs.commands")]
        assert all(module.startswith("cat_rs.commands.sampling") for module in others), f"{file} uses {others}"


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


def test_lazy_names_are_listed() -> None:
    assert set(cat_rs.__all__) <= set(dir(cat_rs))
