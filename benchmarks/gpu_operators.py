"""Parts 0 and 1 of `python bench.py gpu`: what this GPU can do at most, and whether the operators that a step
is made of compute on it what float64 says."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_findings import Check, get_error, time_calls, wait_for
from lora.layers import LoRALinear, reference
from model import parallel
from model.optim import apply_update, build_optimizer
from model.variants import VARIANTS
from model.vit import Attention

IMAGES, TOKENS = 64, 197  # of the step that parts 3 and 4 take
SKINNY = (8, 16, 32, 64)  # ranks


# ------------------------------------------------------------------------------------------------------------
# 0: ceilings


def measure_ceilings(check: Check) -> None:
    """Bytes/s of a copy and FLOP/s of products: large square ones, those of L/16's step, and adapters'."""
    device, side = check.device, 256 if check.tiny else 8192
    bandwidth = measure_copy(device, (1 << 22) if check.tiny else (1 << 30))
    check.record("bandwidth", bandwidth)
    check.say("copy on the device, read and written", f"{bandwidth / 1e9:.0f} GB/s")
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32 as TF32")):
        with parallel.matmul_precision("high"):
            rate = measure_product(device, dtype, side, side, side)
        check.record(f"square_{name.split()[0]}", rate)
        check.say(f"product of {side}³, {name}", f"{rate / 1e12:.1f} TFLOP/s")

    rows = (2 if check.tiny else IMAGES) * TOKENS
    width = VARIANTS["Ti/16" if check.tiny else "L/16"]["embed_dim"]
    shapes = {"qkv": (width, 3 * width), "proj": (width, width)}  # in, out
    shapes |= {"fc1": (width, 4 * width), "fc2": (4 * width, width)}
    flops = seconds = 0.0
    for name, (inputs, outputs) in shapes.items():
        own = measure_linear(device, rows, inputs, outputs)
        count = 3 * 2 * rows * inputs * outputs
        flops, seconds = flops + count, seconds + sum(own.values())
        each = ", ".join(f"{what} {1e3 * s:.3f}" for what, s in own.items())
        rate = count / sum(own.values())
        check.say(
            f"{name} ({rows}, {inputs}) → {outputs}, bfloat16", f"{rate / 1e12:.0f} TFLOP/s; ms: {each}"
        )
    check.record("matmul", flops / seconds)
    check.say("the products of a block of L/16, all twelve", f"{flops / seconds / 1e12:.0f} TFLOP/s")
    for rank in SKINNY:
        measure_skinny(check, rows, width, rank)


def measure_copy(device: torch.device, size: int) -> float:
    """Bytes read and written in a second by a copy of `size` bytes."""
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / time_calls(device, lambda: target.copy_(source), in_a_row=10)


def measure_product(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> float:
    """FLOP/s of (m, k) (k, n), on random numbers."""
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    for _ in range(3):
        torch.mm(a, b, out=out)
    return 2 * m * k * n / time_calls(device, lambda: torch.mm(a, b, out=out), in_a_row=10)


def measure_linear(device: torch.device, rows: int, inputs: int, outputs: int) -> dict[str, float]:
    """Seconds of a bfloat16 Linear's three products: y = x W', dx = dy W, dW = dy' x."""
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    dy = torch.randn(rows, outputs, device=device, dtype=torch.bfloat16)
    products = {"y": lambda: x @ weight.t(), "dx": lambda: dy @ weight, "dW": lambda: dy.t() @ x}
    for product in products.values():
        product()
    return {name: time_calls(device, product, in_a_row=10) for name, product in products.items()}


def measure_skinny(check: Check, rows: int, width: int, rank: int) -> None:
    """An adapter's five products of `rows` rows at a square layer, beside the bytes that they must move."""
    like = dict(device=check.device, dtype=torch.bfloat16)
    x, dy = torch.randn(rows, width, **like), torch.randn(rows, width, **like)
    A, B = torch.randn(rank, width, **like), torch.randn(width, rank, **like)
    ax, dy_B, y = x @ A.t(), dy @ B, torch.randn(rows, width, **like)
    products = {
        "A x": lambda: x @ A.t(),
        "y += B (A x)": lambda: y.addmm_(ax, B.t()),
        "dy B": lambda: dy @ B,
        "dA": lambda: dy_B.t() @ x,
        "dB": lambda: dy.t() @ ax,
    }
    for product in products.values():
        product()
    seconds = {name: time_calls(check.device, product, in_a_row=10) for name, product in products.items()}
    moved = {name: 2 * rows * (width + rank) for name in products}  # bfloat16
    moved["y += B (A x)"] += 2 * rows * width
    each = ", ".join(f"{name} {moved[name] / s / 1e9:.0f}" for name, s in seconds.items())
    check.say(f"rank {rank}, ({rows}, {width})", f"GB/s: {each}")


# ------------------------------------------------------------------------------------------------------------
# 1: operators

# ‖error‖ / ‖right‖ that a product of random numbers may have: a few times what its type rounds away. The
# adapters' gradients go through two products.
BOUNDS = {"highest": 1e-5, "TF32": 2e-3, "bfloat16": 2e-2}


def check_operators(check: Check) -> None:
    """LoRALinear, attention and a skipped update, on this device, against float64 on the CPU."""
    check_lora_linear(check)
    check_attention(check)
    check_skipped_update(check)


def check_lora_linear(check: Check) -> None:
    """y, dx, dA, dB and dW of fused qkvs with three ranks and of square layers of each rank, the worst of
    them; beside it the error of the plain definition in the same precision, for no fast operator should be
    worse."""
    rows, width = (64, 64) if check.tiny else (500, 1024)
    worst: dict[tuple, float] = {}
    plain: dict[tuple, float] = {}
    for ranks in ([8, 16, 64], [64, 8, 32], [8], [16], [32], [64]):
        layer = build_lora_linear(width, ranks)
        x, dy = torch.randn(rows, width), torch.randn(rows, len(ranks) * width)
        right = get_results(layer.double(), x.double(), dy.double(), plainly=True)
        layer = layer.float().to(check.device)
        weight, bias = layer.weight.detach(), layer.bias.detach()
        x, dy = x.to(check.device), dy.to(check.device)
        for precision in BOUNDS:
            exactness = "highest" if precision == "highest" else "high"
            cast = torch.autocast(check.device.type, torch.bfloat16, enabled=precision == "bfloat16")
            for trained in (True, False):
                # A base that is frozen is kept in the compute's type.
                base_dtype = torch.bfloat16 if precision == "bfloat16" and not trained else torch.float32
                layer.weight = nn.Parameter(weight.to(base_dtype), trained)
                layer.bias = nn.Parameter(bias.to(base_dtype), trained)
                case = precision, "trained" if trained else "frozen"
                with parallel.matmul_precision(exactness), cast:
                    for errors, plainly in ((worst, False), (plain, True)):
                        found = get_results(layer, x, dy, plainly)
                        error = max(get_error(found[name], right[name]) for name in found)
                        errors[case] = max(errors.get(case, 0.0), error)
    for precision, base in worst:
        error, plain_error, bound = worst[precision, base], plain[precision, base], BOUNDS[precision]
        text = f"{error:.1e}, plainly {plain_error:.1e}, at most {bound:.0e}"
        holds = error <= bound and error <= 2 * plain_error + 1e-6
        check.say(f"LoRALinear, ranks 8 to 64, base {base}, {precision}: error", text, holds)


def build_lora_linear(width: int, ranks: list[int]) -> LoRALinear:
    """A layer of `len(ranks)` square row parts on the CPU, everything in it random, B too."""
    torch.manual_seed(sum(ranks))
    layer = LoRALinear(width, len(ranks) * width, ranks)
    layer.weight = nn.Parameter(torch.randn(len(ranks) * width, width) / width**0.5)
    layer.bias = nn.Parameter(torch.randn(len(ranks) * width))
    layer.init_adapters(0, "layer")
    with torch.no_grad():
        for B in layer.lora_B.values():
            B.copy_(torch.randn(B.shape))
    return layer


def get_results(layer: LoRALinear, x: Tensor, dy: Tensor, plainly: bool) -> dict[str, Tensor]:
    """{y, dx and every parameter's gradient} of a layer at x (N, in), for the gradient dy (N, out)."""
    x = x.clone().requires_grad_()
    if plainly:
        adapters = [(1.0, *layer.adapter(part)) for part in range(len(layer.ranks))]
        y = reference(x, layer.weight, layer.bias, adapters)
    else:
        y = layer(x)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype))
    return {"y": y, "x": gradients[0]} | dict(zip(trained, gradients[1:]))


# What torch says where a device, or a type, has no kernel of the one backend that it may take.
NO_KERNEL = re.compile("No (available kernel|viable backend)")


def check_attention(check: Check) -> None:
    """Every kernel that torch has for attention, on the model's own strided views, forward and backward."""
    tokens, width, heads = (10, 64, 2) if check.tiny else (TOKENS, 1024, 16)
    torch.manual_seed(0)
    attention = Attention(width, heads, 0.0).double()
    x, dy = torch.randn(4, tokens, width), torch.randn(4, tokens, width)
    with sdpa_kernel(SDPBackend.MATH):
        right = get_attention(attention, x.double(), dy.double())
    attention = attention.float().to(check.device)
    x, dy = x.to(check.device), dy.to(check.device)
    backends = [None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    backends += [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    for backend in backends:
        name = "as torch chooses" if backend is None else backend.name
        try:
            with sdpa_kernel(backend or backends[1:]), torch.autocast(check.device.type, torch.bfloat16):
                found = get_attention(attention, x, dy)
        except RuntimeError as error:
            if backend in (None, SDPBackend.MATH) or not NO_KERNEL.search(str(error)):
                raise
            check.say(f"attention, bfloat16, {name}", str(error).strip().splitlines()[0][:60])
            continue
        error = max(get_error(found[key], right[key]) for key in right)
        holds = error <= BOUNDS["bfloat16"]
        check.say(
            f"attention, bfloat16, {name}: error", f"{error:.1e}, at most {BOUNDS['bfloat16']:.0e}", holds
        )


def get_attention(attention: Attention, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """{y, dx and the weights' gradients} of an Attention at x (B, N, D), for the gradient dy (B, N, D)."""
    x = x.clone().requires_grad_()
    y = attention(x)
    parameters = dict(attention.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy.to(y.dtype))
    return {"y": y, "x": gradients[0]} | dict(zip(parameters, gradients[1:]))


def check_skipped_update(check: Check) -> None:
    """A NaN among the gradients and the flag set: weights, moments and step counts stay as they were."""
    model = nn.Linear(64, 64).to(check.device)
    optimizer = build_optimizer(model, weight_decay=0.1)

    def update(planted: bool, skip: bool) -> list[Tensor]:
        F.mse_loss(
            model(torch.ones(8, 64, device=check.device)), torch.zeros(8, 64, device=check.device)
        ).backward()
        if planted:
            model.weight.grad[3, 5] = float("nan")
        apply_update(optimizer, 0.1, skip=torch.tensor(skip, device=check.device))
        wait_for(check.device)
        tensors = list(model.parameters())
        for state in optimizer.state.values():
            tensors += state.values()
        return [tensor.detach().clone() for tensor in tensors]

    before = update(planted=False, skip=False)
    after = update(planted=True, skip=True)
    same = all(torch.equal(a, b) for a, b in zip(before, after))
    check.say("a NaN gradient, update skipped", "nothing moved" if same else "something moved", same)
    moved = not any(torch.equal(a, b) for a, b in zip(after, update(planted=False, skip=False)))
    check.say("the update after it", "everything moved" if moved else "something did not move", moved)
    broken = not all(torch.isfinite(t).all() for t in update(planted=True, skip=False))
    check.say("control: the same NaN, not skipped", "arrives" if broken else "does not arrive", broken)
