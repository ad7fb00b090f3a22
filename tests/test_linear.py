"""model/linear.py against nn.Linear, and what torch.compile's cache knows of an operator."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import linear
from model.linear import Linear
from model.variants import VARIANTS
from model.vit import VisionTransformer

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(bias=True, dtype=torch.float32):
    """Ours and torch's, with the same parameters."""
    theirs = nn.Linear(24, 36, bias, dtype=dtype)
    ours = Linear(24, 36, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def run(module, x, weights, wanted):
    """Output, and gradients of x and the parameters that are wanted."""
    x = x.detach().requires_grad_("x" in wanted)
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanted)
    y = module(x)
    return y, torch.autograd.grad(
        (y * weights).sum(), [x] * ("x" in wanted) + [p for p in module.parameters() if p.requires_grad]
    )


def assert_same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("wanted", ["x weight bias", "x", "weight", "bias", "x bias"])
@pytest.mark.parametrize("shape", [(5, 24), (3, 7, 24), (2, 3, 4, 24)], ids=len)
def test_function_and_gradients_are_nn_linear_s(shape, wanted, onednn):
    ours, theirs = build()
    x, weights = torch.randn(shape), torch.randn(*shape[:-1], 36)
    with torch.backends.mkldnn.flags(enabled=onednn):
        (y, gradients), (expected, theirs) = (
            run(ours, x, weights, wanted.split()),
            run(theirs, x, weights, wanted.split()),
        )
    assert_same(y, expected)
    for mine, other in zip(gradients, theirs, strict=True):
        assert other.any() and mine.is_contiguous()
        assert_same(mine, other)


@pytest.mark.parametrize("rows", [7, 0])
def test_without_bias_and_with_slices(rows):
    ours, theirs = build(bias=False)
    x, weights = torch.randn(rows, 60)[:, 11:35], torch.randn(36, 2 * rows).t()[::2]
    (y, gradients), (expected, theirs) = (
        run(ours, x, weights, ["x", "weight"]),
        run(theirs, x, weights, ["x", "weight"]),
    )
    for mine, other in zip([y, *gradients], [expected, *theirs], strict=True):
        assert mine.shape == other.shape and torch.allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_products_of_slices_and_of_one_value():
    x, dy = torch.randn(40, 60), torch.randn(40, 50)
    for a, b in (
        (x[:, 3:27], dy[:, 5:20]),
        (x, torch.ones(()).expand(40, 15)),
        (x.t().contiguous().t(), dy[:, :1]),
    ):
        assert_same(linear.weight_gradient(b, a), b.t() @ a)
        assert_same(linear.mm(a.t(), b), a.t() @ b)
        assert linear.weight_gradient(b, a).is_contiguous() and linear.mm(a.t(), b).is_contiguous()


def test_gradients_by_differences(monkeypatch):
    ours, _ = build(dtype=torch.float64)
    monkeypatch.setattr(
        Linear, "forward", lambda self, x: linear.linear(x, self.weight, self.bias)
    )  # float64 would go past the operator
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *ours.parameters()), fast_mode=True)


def test_who_multiplies(monkeypatch):
    """oneDNN in float32, torch's own where it is switched off, and nn.Linear in every other type and under autocast."""
    (ours, theirs), x = build(), torch.randn(5, 24)
    called, mm, plain = [], torch.mm, F.linear
    monkeypatch.setattr(torch, "mm", lambda a, b: called.append("mm") or mm(a, b))
    monkeypatch.setattr(F, "linear", lambda *args: called.append("linear") or plain(*args))

    def calls(module, x):
        called.clear()
        module(x).float().sum().backward()
        return [*called]

    x.requires_grad_()
    assert calls(ours, x) == [] and calls(theirs, x) == ["linear"]
    with torch.backends.mkldnn.flags(enabled=False):
        assert calls(ours, x) == ["linear", "mm", "mm"]
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(ours, x) == ["linear"] and ours(x).dtype == torch.bfloat16
    assert calls(ours.bfloat16(), x.detach().bfloat16()) == ["linear"]


def test_compiled_is_one_graph():
    torch._dynamo.reset()
    (ours, _), before = build(), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    x, weights = torch.randn(3, 7, 24), torch.randn(3, 7, 36)
    expected = run(ours, x, weights, ["x", "weight", "bias"])
    ours.compile(fullgraph=True)
    got = run(ours, x, weights, ["x", "weight", "bias"])
    for mine, other in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        assert_same(mine, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_flops_are_counted():
    ours, theirs = build()
    counts = []
    for module in (ours, theirs):
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(5, 24, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 5 * 24 * 36


def test_the_blocks_linears_are_these(monkeypatch):
    monkeypatch.setitem(VARIANTS, "small", dict(embed_dim=24, depth=2, num_heads=2, patch_size=4))
    model = VisionTransformer("small", 8, 5)
    assert {name for name, m in model.named_modules() if type(m) is nn.Linear} == {"head"}


EDITED = """
import torch, train
model = train.build_model(train.Config(compile=True, dtype="float32", model="tiny-debug"), "full", None, "cpu")
model.init_weights(0)
model.head.weight.data.fill_(0.1)
for p in model.parameters():
    p.requires_grad_(p is model.blocks[-1].mlp.fc2.weight)
(model(torch.ones(2, 3, 28, 28))[:, 0] * torch.tensor([1.0, 2.0])).sum().backward()
print(model.blocks[-1].mlp.fc2.weight.grad.norm().item())
"""


@pytest.mark.slow
def test_an_edit_of_an_operator_s_backward_reaches_the_compiled_model(tmp_path):
    """Of a custom operator torch.compile's cache knows no more than its name."""

    def run_edited(edits, cache):
        code = tmp_path / "code"
        shutil.rmtree(code, ignore_errors=True)
        shutil.copytree(
            ROOT, code, ignore=shutil.ignore_patterns(".*", "runs", "datasets", "tests", "__pycache__")
        )
        for name, old, new in edits:
            text = (code / name).read_text()
            assert old in text
            (code / name).write_text(text.replace(old, new))
        done = subprocess.run(
            [sys.executable, "-c", EDITED],
            cwd=code,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    doubled = (
        "model/linear.py",
        "weight_gradient(dy, x) if need_weight",
        "2 * weight_gradient(dy, x) if need_weight",
    )
    norm = run_edited([], tmp_path / "cache")
    assert run_edited([doubled], tmp_path / "cache") == pytest.approx(2 * norm) and norm > 0
    blind = (
        "model/linear.py",
        "torch.compiler.config.cache_key_tag += ",
        "ignored = ",
    )  # control: so it is with torch's own key
    norm = run_edited([blind], tmp_path / "blind")
    assert run_edited([blind, doubled], tmp_path / "blind") == pytest.approx(norm)
