"""lora/onednn.py against nn.Linear, the verb on a model, and torch.compile's cache with its operators."""

import copy
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora import onednn
from lora.inject import add_lora, init_adapters
from lora.layers import LoRALinear
from lora.onednn import OneDNNLinear, use_onednn
from model.variants import LORA_FAMILIES
from train import Config, build_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def faster_here(monkeypatch):
    """As on a machine where oneDNN's products are taken, whatever this one is."""
    monkeypatch.setattr(onednn, "IS_FASTER", True)
    torch.manual_seed(0)


def build(bias=True, dtype=torch.float32):
    """Ours and torch's, with the same parameters."""
    theirs = nn.Linear(24, 36, bias, dtype=dtype)
    return use_onednn(copy.deepcopy(theirs)), theirs


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


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("wanted", ["x weight bias", "x", "weight", "bias", "x bias"])
@pytest.mark.parametrize("shape", [(5, 24), (3, 7, 24), (2, 3, 4, 24)], ids=len)
def test_function_and_gradients_are_nn_linear_s(shape, wanted, enabled):
    ours, theirs = build()
    x, weights = torch.randn(shape), torch.randn(*shape[:-1], 36)
    with torch.backends.mkldnn.flags(enabled=enabled):
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
        assert_same(onednn.get_weight_gradient(b, a), b.t() @ a)
        assert_same(onednn.mm(a.t(), b), a.t() @ b)
        assert onednn.get_weight_gradient(b, a).is_contiguous() and onednn.mm(a.t(), b).is_contiguous()


def test_gradients_by_differences(monkeypatch):
    ours, _ = build(dtype=torch.float64)
    monkeypatch.setattr(
        OneDNNLinear, "forward", lambda self, x: onednn.linear(x, self.weight, self.bias)
    )  # float64 would go past the operator
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *ours.parameters()), fast_mode=True)


def test_who_multiplies(monkeypatch):
    """oneDNN in float32, torch's own where it is switched off, and nn.Linear in every other type and under
    autocast."""
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


# ---- the verb on a model


def build_net():
    """Two Linears to adapt, one left as it is, and one that is not plain."""
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(12, 2)
    return nn.ModuleDict(
        {"a": nn.Linear(12, 24), "b": nn.Linear(24, 12), "c": nn.Linear(12, 12), "attention": attention}
    )


def adapt(net):
    add_lora(net, {"a": [("a", 1, 2)], "b": [("b", 0, 1)]}, {"a": [3], "b": [2]})
    init_adapters(net, 0)
    for i, name in enumerate(("a", "b")):
        for B in net[name].lora_B.values():
            nn.init.normal_(B, generator=torch.Generator().manual_seed(i))
    return net


def forward(net, x):
    return net["c"](net["b"](net["a"](x).sin()))


@pytest.fixture
def products(monkeypatch):
    """How many products oneDNN has made so far, in a list."""
    count, multiply = [], onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda *args: count.append(1) or multiply(*args))
    return count


def test_the_verb_changes_the_products_and_nothing_else(products, monkeypatch):
    monkeypatch.setattr(onednn, "IS_FASTER", False)
    net = adapt(build_net())
    before, objects, x = net.state_dict(), dict(net.named_parameters()), torch.randn(7, 12)
    expected = forward(use_onednn(net), x)
    assert (
        not products and type(net["c"]) is nn.Linear
    )  # control: where it is not faster, the verb does nothing
    monkeypatch.setattr(onednn, "IS_FASTER", True)
    assert use_onednn(net) is net
    assert_same(forward(net, x), expected)
    assert len(products) == 3
    assert net.state_dict().keys() == before.keys()
    assert all(p is objects[name] for name, p in net.named_parameters())
    kinds = {name: type(module) for name, module in net.named_children()}
    assert kinds == {"a": LoRALinear, "b": LoRALinear, "c": OneDNNLinear, "attention": nn.MultiheadAttention}
    assert not isinstance(net["attention"].out_proj, OneDNNLinear)  # a subclass may compute something else
    copied = copy.deepcopy(use_onednn(net))  # a second call changes nothing, and a copy is no other
    assert {name: type(module) for name, module in copied.named_children()} == kinds
    assert torch.equal(forward(copied, x), forward(net, x))


def test_the_verb_before_or_after_adapters():
    before, after = adapt(use_onednn(build_net())), use_onednn(adapt(build_net()))
    x = torch.randn(7, 12)
    assert torch.equal(forward(before, x), forward(after, x))


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_the_machine_is_asked(vendor, capability, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id : {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn.is_amd_with_avx512() == ((vendor, capability) == ("AuthenticAMD", "AVX512"))


def test_a_cpu_without_avx512_can_be_played():
    """In a process with ATEN_CPU_CAPABILITY=avx2, which bench.py step is measured in for such a machine."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    code = "from lora import onednn; print(onednn.IS_FASTER)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("fast", [True, False])
def test_the_verb_under_autocast_and_in_bfloat16(products, fast):
    """There torch multiplies, whatever was asked for."""
    net, x = adapt(build_net()), torch.randn(7, 12)
    if fast:
        use_onednn(net)
    with torch.autocast("cpu", torch.bfloat16):
        got = forward(net, x)
    assert got.dtype == torch.bfloat16 and not products
    torch.testing.assert_close(got.float(), forward(net, x), rtol=0, atol=0.03 * got.abs().max().item())
    assert forward(net.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("phase", ["full", "warmup", "lora"])
def test_a_model_s_blocks_multiply_so_and_its_head_does_not(phase):
    ranks = None if phase == "full" else {family: [2] * 4 for family in LORA_FAMILIES}
    model = build_model(Config(model="tiny-debug", compile=False), phase, ranks, "meta")
    assert {name for name, m in model.named_modules() if type(m) is nn.Linear} == {"head"}
    inner = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    assert {type(m) for m in inner} == {OneDNNLinear if phase == "full" else LoRALinear} and len(inner) == 16


# ---- torch.compile's cache

EDITED = """
import torch
from torch import nn
from lora import onednn
torch.manual_seed(0)
onednn.IS_FASTER = True
model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
onednn.use_onednn(model).compile(fullgraph=True)
model(torch.ones(2, 8)).sum().backward()
print(model[0].weight.grad.norm().item(), model[1].bias.grad.norm().item())
"""
DOUBLED = ("onednn.py", "linear_dweight(dy, x) if need_weight", "2 * linear_dweight(dy, x) if need_weight")
BLIND = ("onednn.py", "torch.compiler.config.cache_key_tag += ", "ignored = ")


def run_edited(tmp_path, edits, cache):
    """Norms of the first Linear's dW and the second's dbias, by a copy of lora/ with the edits."""
    shutil.rmtree(tmp_path / "code", ignore_errors=True)
    shutil.copytree(ROOT / "lora", tmp_path / "code" / "lora", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in edits:
        file = tmp_path / "code" / "lora" / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
    command = [sys.executable, "-c", EDITED]
    done = subprocess.run(command, cwd=tmp_path / "code", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
def test_an_edit_of_an_operator_s_backward_reaches_the_compiled_model(tmp_path):
    """torch.compile's cache knows of a custom operator no more than its name."""
    dweight, dbias = run_edited(tmp_path, [], "cache")
    assert dweight > 0 and dbias > 0
    assert run_edited(tmp_path, [DOUBLED], "cache") == pytest.approx([2 * dweight, dbias])
    # control: so it is with torch's own key
    assert run_edited(tmp_path, [BLIND], "blind") == pytest.approx([dweight, dbias])
    assert run_edited(tmp_path, [BLIND, DOUBLED], "blind") == pytest.approx([dweight, dbias])


VECTORS = """
import sys, torch
if sys.argv[1] == "known":
    from lora import onednn
f = torch.compile(lambda x: x.sigmoid() * 2)
x = torch.linspace(-1, 1, 4096)
assert torch.equal(f(x), f(x))
print((f(x) - x.sigmoid() * 2).abs().nan_to_num(1).max().item() < 1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(onednn.CPU_CAPABILITY != "AVX512", reason="has one width of vectors")
def test_the_cache_s_key_knows_the_width_of_vectors(tmp_path):
    """As under ATEN_CPU_CAPABILITY, so with a cache on a file system of unlike machines."""

    def is_right(known: str, capability: str) -> bool:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / known)}
        environment |= {"ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", VECTORS, known]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.stdout.split() == ["True"]

    assert is_right("known", "avx512") and is_right("known", "avx2")
    # control: so it is with torch's own key
    assert is_right("unknown", "avx512") and not is_right("unknown", "avx2")


def test_the_cache_s_key_knows_every_file_of_operators():
    """One checksum for each, once; and no operator is anywhere else."""
    files = sorted((ROOT / "lora").glob("*.py"))
    tags = torch.compiler.config.cache_key_tag.split("/")
    known = {file.name for file in files if f"{zlib.crc32(file.read_bytes()):x}" in tags}
    assert known == {file.name for file in files if "custom_op(" in file.read_text()} == {"onednn.py"}
    assert len(tags) == len(set(tags))
