"""The house's own rules: which room may import which."""

import ast
import re
from pathlib import Path

import pytest
from helpers.common import HEAVY, ROOT, alone

PACKAGE = ROOT / "remix_cli"
TESTS = ROOT / "tests"
FILES = sorted(PACKAGE.rglob("*.py"))
# Room -> rooms it may import. Arrows point one way; `errors`, `storage`, `stored_json` and `compat` are open to all.
ALLOWED = {
    "errors": set(),
    "storage": set(),
    "stored_json": set(),
    "streams": set(),
    "terminal": {"streams"},
    "compat": set(),
    "launch": set(),
    "core": set(),
    "own_settings": set(),
    "recipe": {
        "own_settings",
        "core.config",
        "core.estimators.registry",
        "tasks.registry",
        "data.formats.registry",
        "methods.registry",
    },
    "tasks": {"own_settings", "data", "evaluation", "sandbox"},  # and is known to others by what it declares
    "methods": {"own_settings", "core"},
    "data": {"recipe"},
    "cross_entropy": set(),
    "models": {"core", "recipe", "data", "cross_entropy"},
    "folders": {"core.description", "core.lora_folder", "recipe", "methods.registry"},
    "runs": {"launch", "core", "recipe", "methods", "data", "models", "folders"},
    "diagnostics": {"core", "recipe", "data", "models", "runs"},
    "sandbox": set(),
    "evaluation": {"launch", "core", "recipe", "data", "models", "folders", "runs", "sandbox", "tasks"},
    "export": {"core", "recipe", "methods", "data", "models", "folders", "runs", "evaluation.report"},
    "train": {
        "cross_entropy",
        "core",
        "recipe",
        "methods",
        "data",
        "models",
        "runs",
        "diagnostics",
        "evaluation",
        "tasks",
    },
    "verify": {"core", "data", "models"},
    "sweep": {"recipe", "runs", "train", "evaluation", "streams", "terminal", "folders", "tasks"},
    "integrations": {"core", "cross_entropy", "data", "models", "train", "export.hub"},
    "cli": {
        "launch",
        "streams",
        "terminal",
        "folders",
        "recipe",
        "runs",
        "data",
        "train",
        "sweep",
        "evaluation",
        "diagnostics",
        "export",
        "verify",
        "tasks",
    },
    "__main__": {"cli"},
    "__init__": set(),
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Those that run, not those for the type checker alone."""
    tree, found = ast.parse(path.read_text()), []
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("remix_cli."):
            found.append(node.module.removeprefix("remix_cli."))
        elif isinstance(node, ast.Import):
            found += [a.name.removeprefix("remix_cli.") for a in node.names if a.name.startswith("remix_cli.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = room(path)
    for module in imports(path):
        target = module.split(".")[0]
        allowed = ALLOWED[here] | {here, "errors", "storage", "stored_json", "compat"}
        assert target in allowed or module in allowed, f"{here} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_we_read_can_run_code(path):
    """No pickle, no yaml.load, no torch.load, no eval or exec, anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "exec" and path.name == "inside.py":
                continue  # the confined process, whose business it is
            assert called not in {"yaml.load", "torch.load", "eval", "exec", "pickle.load", "pickle.loads"}, called
        if isinstance(node, ast.Import):
            assert not {a.name for a in node.names} & {"pickle", "dill", "joblib"}


@pytest.mark.parametrize("package", sorted(p.parent for p in PACKAGE.rglob("*/__init__.py")), ids=lambda p: p.name)
def test_a_rooms_docstring_names_every_file(package):
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    assert [p.name for p in package.glob("*.py") if p.name not in said] == ["__init__.py"]


def test_the_library_needs_torch_and_safetensors_only():
    code = (
        "import pkgutil, sys, remix_cli.core as core\n"
        "for name in core.__all__: getattr(core, name)\n"
        "bad = {'transformers', 'accelerate', 'datasets', 'pydantic', 'yaml', 'rich', 'typer'} & set(sys.modules)\n"
        "sys.exit(','.join(bad) or 0)"
    )
    done = alone(code)
    assert done.returncode == 0, done.stderr


VERBS = [
    "train",
    "sweep",
    "find-rate",
    "budget",
    "validate",
    "schema",
    "verify-estimator",
    "eval",
    "compare",
    "route-stats",
    "export",
    "generate",
    "chat",
]


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)], ids=" ".join)
def test_help_is_quick_and_needs_no_torch(verb):
    code = (
        f"import sys; sys.argv = ['remix', *{verb}, '--help']\n"
        "from remix_cli.cli import app\n"
        "try: app(prog_name='remix')\n"
        "except SystemExit as e: assert e.code == 0\n"
        f"assert not sys.modules.keys() & {HEAVY}"
    )
    done = alone(code)
    assert done.returncode == 0, done.stderr
    assert "Usage: remix" in done.stdout


def test_every_fault_of_the_reliability_page_has_a_test_of_its_name():
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| ([A-Z]\d+) \|.*\| (.*) \|$", page.split("Not covered")[0], flags=re.MULTILINE)
    assert len(rows) > 50
    found = re.compile(r"^def (test_\w+)", flags=re.MULTILINE)
    tests = {path.stem: found.findall(path.read_text()) for path in TESTS.rglob("*.py")}
    for fault, where in rows:
        if fault == "L4":
            continue
        patterns = re.findall(r"`(test_\w+)\*`", where)
        assert any(fault in pattern.split("_") for pattern in patterns), fault
        for pattern in patterns:
            assert any(name.startswith(pattern) for names in tests.values() for name in names), (fault, pattern)
    named = {
        part
        for names in tests.values()
        for n in names
        for part in n.split("_")
        if re.fullmatch("[RDKSMNALX]\\d+", part)
    }
    assert named <= {fault for fault, _ in rows}


def test_no_test_imports_another():
    """What tests share lies in tests/helpers."""
    for path in TESTS.rglob("*.py"):
        modules = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), flags=re.MULTILINE)
        assert not [name for name in modules if name.startswith(("test_", "conftest"))], path


def test_tests_mirror_the_package():
    rooms = {path.name for path in PACKAGE.iterdir()}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders - rooms == {"faults", "helpers"}
