"""What is read from the sources: who may import whom (leaves know nothing of each other, nobody imports in a
circle), and who may say how exact products are."""

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ("model", "lora", "monitor", "data")
NEUTRAL = {"errors", "files"}  # what everybody may import
# Beyond the leaves: a file or folder, and what of this repository it may import besides them.
UPPER = {
    "config": {"config"},
    "start": {"config", "launch"},
    "train": {"config", "launch", "start"},
    "launch": {"config", "launch", "start", "train"},
    # Their model is no ViT: of the leaves they take those that are for any model.
    "lm": {"config", "lora", "monitor", "lm_study", "replay"},
    "lm_study": {"config", "lora", "monitor"},
}
# Without a ViT -> what of `model` they may import.
NO_VIT = {"lm": ("model.optim.",), "lm_study": ()}


def get_sources() -> dict[str, Path]:
    """Module name -> file, of everything in git but the tests; a package's __init__ under the package's
    name."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [Path(name) for name in listed.stdout.split() if (ROOT / name).is_file()]
    modules = {}
    for file in files:
        if file.parts[0] != "tests":
            parts = file.with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ROOT / file
    return modules


SOURCES = get_sources()
HOUSE = {name.split(".")[0] for name in SOURCES} | {"tests"}


def get_imports(source: str, package: str = "") -> list[str]:
    """The modules that a source imports, wherever in it; `from a import b` as a.b, which is a module or a
    name of a's."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            where = ".".join(filter(None, [*above, node.module]))
            names += [f"{where}.{alias.name}" if where else alias.name for alias in node.names]
    return names


def violations(source: str, package: str, allowed: set[str] = frozenset()) -> list[str]:
    """Of this house's modules those that the source, in `package`, may not import."""
    there = HOUSE - {package} - NEUTRAL - allowed
    return [name for name in get_imports(source, package) if name.split(".")[0] in there]


def find_circle(imports: dict[str, list[str]]) -> list[str]:
    """Modules that import each other in a circle, [] where there is none. `imports`: module -> names it
    imports."""
    graph = {}
    for module, names in imports.items():
        known = {name if name in imports else name.rpartition(".")[0] for name in names}
        graph[module] = (known & imports.keys()) - {module}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("module", [name for name in SOURCES if name.split(".")[0] in LEAVES])
def test_leaves_know_nothing_of_each_other(module):
    assert violations(SOURCES[module].read_text(), module.split(".")[0]) == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name.split(".")[0] in UPPER])
def test_who_stands_above_whom(module):
    top = module.split(".")[0]
    leaves = set() if top in NO_VIT else set(LEAVES)
    found = violations(SOURCES[module].read_text(), top, UPPER[top] | leaves)
    assert [name for name in found if not name.startswith(NO_VIT.get(top, ()))] == []


def test_no_import_goes_in_a_circle():
    packages = {name: path.name == "__init__.py" for name, path in SOURCES.items()}
    imports = {}
    for name, path in SOURCES.items():
        imports[name] = get_imports(path.read_text(), name if packages[name] else name.rpartition(".")[0])
    assert find_circle(imports) == []


def test_everything_is_looked_at():
    assert all(any(name.startswith(f"{leaf}.") for name in SOURCES) for leaf in LEAVES)
    assert {
        "train",
        "start",
        "study",
        "bench",
        "evaluate",
        "export",
        "replay",
        "errors",
        "files",
    } <= SOURCES.keys()


@pytest.mark.parametrize(
    "source, found",
    [
        ("import torch\nfrom lora.layers import LoRALinear\nfrom . import ranks\nimport modeling", []),
        ("from errors import UserError\nfrom files import read_json", []),
        ("from model.vit import VisionTransformer", ["model.vit.VisionTransformer"]),
        ("def late():\n    import train", ["train"]),
        ("import study", ["study"]),
        ("import torch, monitor.norms as norms", ["monitor.norms"]),
        ("try:\n    from data import loader\nexcept ImportError:\n    pass", ["data.loader"]),
        ("from ..model import vit", ["model.vit"]),
    ],
)
def test_control(source, found):
    assert violations(source, "lora") == found


@pytest.mark.parametrize(
    "imports, circle",
    [
        ({"a": ["b.name"], "b": ["c"], "c": []}, set()),
        ({"a": ["b.name"], "b": ["a"]}, {"a", "b"}),
        (
            {"data.x": ["data.y.f"], "data.y": ["data.z"], "data.z": ["data.x"]},
            {"data.x", "data.y", "data.z"},
        ),
    ],
)
def test_control_of_circles(imports, circle):
    assert set(find_circle(imports)) == circle


# ---- how exact products are

# What sets it in torch, by its names of today and of yesterday.
PRECISION = {"set_float32_matmul_precision", "fp32_precision", "allow_tf32"}
# One says it for a process, the other otherwise for as long as something is compared.
PLACES = {("model.parallel", "set_up_device"), ("model.parallel", "matmul_precision")}


def find_precision(source: str) -> set[str]:
    """The functions of a source, "" for none, that set how exact products are."""
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        names = {getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "value", None)}
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        if any(isinstance(name, str) and name in PRECISION for name in names):
            found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_precision_is_set_in_one_place():
    found = {(name, function) for name in SOURCES for function in find_precision(SOURCES[name].read_text())}
    assert found == PLACES


@pytest.mark.parametrize(
    "source, found",
    [
        ("def ask():\n    return torch.get_float32_matmul_precision()", set()),
        ("torch.set_float32_matmul_precision('high')", {""}),
        ("def step():\n    if cuda:\n        torch.set_float32_matmul_precision('high')", {"step"}),
        ("from torch import set_float32_matmul_precision", {""}),
        ("def f():\n    torch.backends.cuda.matmul.allow_tf32 = True", {"f"}),
        ("def f():\n    torch.backends.cudnn.conv.fp32_precision = 'tf32'", {"f"}),
        ("def f():\n    setattr(torch.backends.cudnn, 'allow_tf32', True)", {"f"}),
    ],
)
def test_control_of_precision(source, found):
    assert find_precision(source) == found
