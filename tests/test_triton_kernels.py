"""lora/triton_kernels.py, and what lora/kernels.py makes of it, without a GPU: the kernels run by Triton's
interpreter against float64, and compiled for an A100 and an H100.

The interpreter cuts bfloat16 off instead of rounding, and can't multiply it. float16 takes its place.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from lora import kernels, triton_kernels  # noqa: E402
from lora.inject import freeze_base  # noqa: E402
from lora.layers import LoRALinear, reference  # noqa: E402

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
ERROR = {torch.float32: 1e-5, torch.float16: 1e-3}  # ‖error‖ / ‖right‖, of what is rounded to that type


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def interpreted(monkeypatch):
    """CPU tensors go the GPU's way, through the interpreter."""
    if TRITON < (3, 8):
        pytest.skip("before 3.8 Triton's interpreter does not get along with NumPy 2.4")
    for name in ("effective_weight_kernel", "adapter_gradients_kernel"):
        function = getattr(triton_kernels, name).fn
        monkeypatch.setattr(triton_kernels, name, InterpretedFunction(function))
    monkeypatch.setattr(kernels, "uses_triton", lambda tensor: True)


def assert_near(got, expected, dtype):
    assert got.shape == expected.shape
    assert (got.double() - expected).norm() <= ERROR[dtype] * expected.norm()


# ---- against float64


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("rank", [2, 3, 16, 64])
@pytest.mark.parametrize("out, inputs", [(64, 128), (70, 130), (5, 3)])
def test_effective_weight(interpreted, out, inputs, rank, dtype):
    """Sums of float32, strided factors, with a border and without."""
    W, B, A = torch.randn(out, inputs), torch.randn(rank, out).t(), torch.randn(rank, 2 * inputs)[:, ::2]
    exact = W.double() + B.double() @ A.double()
    assert_near(triton_kernels.effective_weight(W, B, A, dtype, False), exact, dtype)
    bordered = triton_kernels.effective_weight(W, B, A, dtype, True)
    border = bordered.shape[0] - out
    assert border % 16 == 0 and rank <= border < rank + 16 and bordered.shape[1] == inputs + border
    assert_near(bordered[:out, :inputs], exact, dtype)
    assert torch.equal(bordered[:out, inputs : inputs + rank], B.to(dtype))
    assert torch.equal(bordered[out : out + rank, :inputs], A.to(dtype))
    assert not bordered[:out, inputs + rank :].any() and not bordered[out + rank :, :inputs].any()


def test_the_sum_is_float32_s_from_a_float32_base(interpreted):
    """An update of 3e-5 of W arrives whole in float16; onto a rounded W it does not."""
    W, B, A = torch.randn(512, 512), torch.randn(512, 8), torch.randn(8, 512)
    B *= 3e-5 * W.norm() / (B @ A).norm()
    BA = B @ A
    shares = []
    for base in (W, W.half()):
        effective = triton_kernels.effective_weight(base, B, A, torch.float16, False)
        arrived = effective.float() - W.half().float()
        shares.append(((arrived * BA).sum() / BA.square().sum()).item())
    assert abs(shares[0] - 1) < 0.03 and shares[1] < 0.5, shares


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("rank", [2, 3, 16, 70])
@pytest.mark.parametrize("rows, inputs, out", [(200, 64, 128), (1, 70, 130), (300, 5, 3), (0, 8, 8)])
def test_adapter_gradients(interpreted, rows, inputs, out, rank, dtype):
    """From slices of wider matrices, as they are of products with a border, and transposed ones."""
    x, dy = torch.randn(inputs, rows).t().to(dtype), torch.randn(rows, out + 9).to(dtype)[:, :out]
    ax, dy_B = torch.randn(2, rows, rank + 5).to(dtype)[:, :, 2:]  # of rank columns, and three more
    slabs = triton_kernels.adapter_gradients(x, dy, ax, dy_B, rank)
    assert slabs.dtype == torch.float32 and len(slabs) <= rows // 16 + 1
    got = slabs.sum(0)
    assert_near(got[:, :inputs], dy_B[:, :rank].double().t() @ x.double(), torch.float32)
    assert_near(got[:, inputs:], ax[:, :rank].double().t() @ dy.double(), torch.float32)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "inputs, out, ranks, alpha",
    [(12, 24, [2, 4, 3], None), (12, 24, [2, 0, 3], 5.0), (70, 70, [64], 2.0), (50, 20, [2], None)],
)
def test_lora_linear_by_these_kernels(interpreted, inputs, out, ranks, alpha, bias, first, frozen, dtype):
    """The plain definition in float64, gradients included."""
    linear = LoRALinear.from_linear(nn.Linear(inputs, out, bias), ranks, alpha)
    linear.init_adapters(0, "")
    adapters, start = [], 0
    for part, rank in enumerate(ranks):
        if rank:
            nn.init.normal_(linear.lora_B[str(part)])
    if frozen:
        freeze_base(linear)
    x = torch.randn(2, 50, inputs, requires_grad=not first)

    exact = {
        name: p.detach().double().requires_grad_(p.requires_grad) for name, p in linear.named_parameters()
    }
    for part, rank in enumerate(ranks):
        A = exact["lora_A"][start : start + rank]
        B = exact[f"lora_B.{part}"] if rank else A.new_empty(out // len(ranks), 0)
        adapters.append((alpha / rank if alpha and rank else 1.0, B, A))
        start += rank
    x_exact = x.detach().double().requires_grad_(not first)
    expected = reference(x_exact, exact["weight"], exact.get("bias"), adapters)

    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        got = linear(x)
    weights = torch.randn_like(expected)
    names = [name for name, p in exact.items() if p.requires_grad]
    wanted = [linear.get_parameter(name) for name in names] + [x] * (not first)
    mine = torch.autograd.grad(got, wanted, weights.to(got.dtype))
    theirs = torch.autograd.grad(expected, [exact[name] for name in names] + [x_exact] * (not first), weights)
    assert_near(got, expected, dtype)
    for a, b, leaf in zip(mine, theirs, wanted):
        assert b.any() and a.dtype == leaf.dtype == torch.float32
        assert_near(a, b, dtype)


def test_two_runs_have_the_same_bits(interpreted):
    x, dy, ax, dy_B = torch.randn(900, 40), torch.randn(900, 30), torch.randn(900, 9), torch.randn(900, 9)
    first, second = [triton_kernels.adapter_gradients(x, dy, ax, dy_B, 9) for _ in range(2)]
    assert len(first) > 1 and torch.equal(first, second)


# ---- compiled for GPUs that are not here

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a multiprocessor that a program may have


# What need not be a multiple of 16. Ranks are any numbers, their border is one.
UNKNOWN = {"effective_weight_kernel": ("RANK", "B_row"), "adapter_gradients_kernel": ("N", "STEPS", "RANK")}


def compile_for(sm, kernel, pointers, constants, num_warps, aligned):
    """What ptxas says of the kernel, its bytes of shared memory and its PTX. `aligned`: as compiled blocks
    give it their tensors, with rows that begin at multiples of 16; else nothing is known of them."""
    names = kernel.arg_names
    if aligned:
        constants = constants | {name: 1 for name in names if name.endswith("_column")}
    free = [name for name in names if name not in constants]
    signature = {name: pointers.get(name, "i32") for name in free}
    signature |= dict.fromkeys(constants, "constexpr")
    known = [name for name in free if name not in UNKNOWN[kernel.fn.__name__]] if aligned else []
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": num_warps})
    name = f"sm_{sm}a" if sm == 90 else f"sm_{sm}"
    command = [PTXAS, "-v", f"--gpu-name={name}", "/dev/stdin", "-o", "/dev/null"]
    done = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, compiled.metadata.shared, compiled.asm["ptx"]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("sm", SHARED)
@pytest.mark.parametrize("name", ["effective_weight", "adapter_gradients"])
def test_registers_and_shared_memory(name, sm, dtype, aligned):
    constants = dict(triton_kernels.TILES if name == "effective_weight" else triton_kernels.SLABS)
    warps = constants.pop("num_warps")
    pointers = dict.fromkeys(("weight", "B", "A"), "*fp32") | {"result": f"*{dtype}"}
    if name == "adapter_gradients":
        pointers = dict.fromkeys(("x", "dy", "ax", "dy_B"), f"*{dtype}") | {"result": "*fp32"}
        constants["BLOCK_N"] = triton_kernels.ROWS[{"bf16": 2, "fp32": 4}[dtype]]
    kernel = getattr(triton_kernels, f"{name}_kernel")
    said, shared, ptx = compile_for(sm, kernel, pointers, constants, warps, aligned)
    (registers,) = map(int, re.findall(r"Used (\d+) registers", said))
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], said
    assert shared <= SHARED[sm] / 2  # two programs beside each other
    assert registers * 32 * warps <= 65536  # one of them
    if dtype == "bf16":  # 16 bytes at a time; control: one number at a time where nothing is known
        one_by_one = "st.global.b16" if name == "effective_weight" else "ld.global.b16"
        assert (one_by_one not in ptx) == aligned


def test_control_a_tile_that_spills_is_seen():
    constants = {"BLOCK_R": 128, "BLOCK_C": 256, "BLOCK_N": 64}
    pointers = dict.fromkeys(("x", "dy", "ax", "dy_B"), "*fp32") | {"result": "*fp32"}
    said, *_ = compile_for(80, triton_kernels.adapter_gradients_kernel, pointers, constants, 4, False)
    assert re.findall(r"(\d+) bytes spill", said) != ["0", "0"]
