"""Who may import whom, and what the pure parts may not touch. The arrows of the architecture page are these."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "hyperflexis"

ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "fd_limit": set(),
    "core": set(),
    "kv_blocks": {"core"},
    "metrics": {"core"},
    "wire": {"core"},
    "openai_api": {"core"},
    "transfer": {"core"},
    "policy": {"core"},
    "scaling": {"policy", "core"},
    "disaggregation": {"policy", "core"},
    "loading": {"policy", "core"},
    "controller": {"scaling", "disaggregation", "loading", "policy", "core"},
    "sequences": {"policy", "core", "kv_blocks"},
    "batcher": {"sequences", "policy", "core", "kv_blocks"},
    "sim": {"controller", "batcher", "sequences", "policy", "core"},
    "runtime": {"controller", "core", "wire", "metrics", "fd_limit"},
    "gateway": {"core", "openai_api", "wire", "metrics", "fd_limit"},
    "engines": {"batcher", "sequences", "policy", "core", "openai_api", "wire", "metrics", "transfer", "fd_limit"},
    "launch": {"core", "wire", "metrics"},
    "telemetry": {"core", "metrics"},
}
"""A part of the package and the parts it may import besides itself and errors. What is not listed is a command: it may
import everything, and nothing here may import it."""

PURE = {
    "core",
    "policy",
    "scaling",
    "disaggregation",
    "loading",
    "controller",
    "batcher",
    "sequences",
    "kv_blocks",
    "sim",
}
IMPURE_MODULES = {
    "asyncio",
    "concurrent",
    "datetime",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
}
GLOBAL_RANDOM = {"random.random", "random.choice", "random.shuffle", "random.gauss", "random.seed", "random.randint"}
CONFIG = {"config"}

FILES = sorted(SOURCE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Absolute names of all modules and names that a file imports, wherever in it."""
    package = ("hyperflexis", *file.relative_to(SOURCE).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def own_parts(file: Path) -> set[str]:
    """The parts of the package that a file imports."""
    names = {name.split(".")[1] for name in imports(file) if name.startswith("hyperflexis.")}
    return {name for name in names if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()}


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) in ARROWS], ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_follow_the_arrows(file: Path) -> None:
    part = part_of(file)
    assert own_parts(file) - {part, "errors"} <= ARROWS[part]


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) in PURE], ids=lambda f: str(f.relative_to(SOURCE)))
def test_pure_parts_have_no_clock_and_no_input_or_output(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file)}
    assert not roots & IMPURE_MODULES
    tree = ast.parse(file.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & (GLOBAL_RANDOM | {"open", "print", "input"})


def test_the_checks_see_imports() -> None:
    assert {"core", "policy"} <= own_parts(SOURCE / "controller.py")
    assert "asyncio" in imports(SOURCE / "wire.py")


def test_the_fleet_file_is_read_by_commands_only() -> None:
    for file in FILES:
        if part_of(file) in ARROWS:
            assert not own_parts(file) & CONFIG


def test_all_but_what_is_inside_an_engine_or_moves_its_tensors_imports_without_torch() -> None:
    modules = [
        ".".join(("hyperflexis", *file.relative_to(SOURCE).with_suffix("").parts))
        for file in FILES
        if file.name not in ("__init__.py", "__main__.py", "make_model.py")
        and "torch" not in file.relative_to(SOURCE).parts
        and file not in [SOURCE / "engines" / "vllm" / f"{name}.py" for name in ("scheduler", "loader", "worker")]
        and file != SOURCE / "transfer" / "group.py"  # what moves PyTorch's tensors
    ]
    program = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'safetensors', 'transformers', 'matplotlib', 'numpy', 'scipy'):
            raise ModuleNotFoundError(f'blocked: {{name}}', name=name)
sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
