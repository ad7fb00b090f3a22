"""Who may import whom: model, lora, monitor and data know third parties and themselves, no other and never train."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ("model", "lora", "monitor", "data")
HOUSE = {*LEAVES, "train", "evaluate", "export", "replay", "bench", "benchmarks", "launch", "config", "tests"}


def violations(source, package):
    """Modules of this repository outside `package` that the source imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module)
        elif isinstance(node, ast.ImportFrom) and node.level > 1:  # one dot stays inside a flat package
            names.append("train")
    return [name for name in names if name.split(".")[0] in HOUSE - {package}]


@pytest.mark.parametrize("path", [path for leaf in LEAVES for path in sorted((ROOT / leaf).rglob("*.py"))],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_leaves_know_nothing_of_each_other(path):
    assert violations(path.read_text(), path.relative_to(ROOT).parts[0]) == []


def test_every_leaf_is_looked_at():
    assert all(list((ROOT / leaf).glob("[a-z]*.py")) for leaf in LEAVES)


@pytest.mark.parametrize("source, found", [
    ("import torch\nfrom lora.layers import LoRALinear\nfrom . import ranks\nimport modeling", []),
    ("from model.vit import VisionTransformer", ["model.vit"]),
    ("def late():\n    import train", ["train"]),
    ("import torch, monitor.norms as norms", ["monitor.norms"]),
    ("try:\n    from data import loader\nexcept ImportError:\n    pass", ["data"]),
    ("from ..model import vit", ["train"]),
])
def test_control(source, found):
    assert violations(source, "lora") == found
