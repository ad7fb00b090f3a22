"""Parts 0 and 1 of `python bench.py gpu`: what this GPU can do at most, and whether the operators that a step
is made of compute on it what float64 says."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_findings import Check, get_error, time_calls, wait_for
from lora import kernels
from lora.layers import LoRALinear, reference
from model import parallel
from model.optim import apply_update, build_optimizer
from model.variants import VARIANTS
from model.vit import Attention

IMAGES, TOKENS = 64, 197  # of the step that parts 3 and 4 take
RANKS = (8, 16, 32, 64)


# ------------------------------------------------------------------------------------------------------------
# 0: ceilings


def measure_ceilings(check: Check) -> None:
    """Bytes/s of a copy and FLOP/s of products: large square ones, those of L/16's step; and what adapters
    add to them."""
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
    for rank in RANKS:
        measure_adapters(check, rows, width, width, rank)
    measure_adapters(check, rows, width, 3 * width, 3 * RANKS[-1])


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


def measure_adapters(check: Check, rows: int, inputs: int, outputs: int, rank: int) -> None:
    """What adapters of so many ranks add to a Linear of `rows` rows: how much longer its product takes with
    the border of `make_weight`, and how fast the two kernels move the bytes that they must."""
    like = dict(device=check.device, dtype=torch.bfloat16)
    x, dy = torch.randn(rows, inputs, **like), torch.randn(rows, outputs, **like)
    ax, dy_B = torch.randn(rows, rank, **like), torch.randn(rows, rank, **like)
    weight = torch.randn(outputs, inputs, device=check.device)
    B, A = torch.randn(outputs, rank, device=check.device), torch.randn(rank, inputs, device=check.device)
    bordered = make_weight(weight, B, A, torch.bfloat16, True)  # (out + r, in + r)
    plain = bordered[:outputs, :inputs].contiguous()
    calls = {
        "without": lambda: x @ plain.t(),
        "with": lambda: x @ bordered[:, :inputs].t(),
        "effective_weight": lambda: make_weight(weight, B, A, torch.bfloat16, True),
        "adapter_gradients": lambda: make_gradients(x, dy, ax, dy_B),
    }
    moved = {
        "effective_weight": 4 * (weight.numel() + B.numel() + A.numel()) + 2 * bordered.numel(),
        "adapter_gradients": 2 * rows * (inputs + outputs + 2 * rank)
        + 4 * calls["adapter_gradients"]().numel(),
    }
    for call in calls.values():
        call()
    seconds = {name: time_calls(check.device, call, in_a_row=10) for name, call in calls.items()}
    product = f"product {1e3 * seconds['without']:.3f} ms, with border {1e3 * seconds['with']:.3f}"
    each = ", ".join(f"{name} {moved[name] / seconds[name] / 1e9:.0f}" for name in moved)
    check.say(f"ranks {rank}, ({rows}, {inputs}) → {outputs}", f"{product}; GB/s: {each}")


# ------------------------------------------------------------------------------------------------------------
# the kernels of lora/triton_kernels.py, and on a CPU what they compute


def make_weight(weight: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype, bordered: bool) -> Tensor:
    """`effective_weight` on a GPU; elsewhere its definition."""
    if kernels.uses_triton(weight):
        return kernels.triton_kernels.effective_weight(weight, B, A, dtype, bordered)
    return define_weight(weight, B, A, bordered).to(dtype)


def define_weight(weight: Tensor, B: Tensor, A: Tensor, bordered: bool) -> Tensor:
    """W + B A (out, in); with a border [[W + B A, B], [A, 0]], as wide as the ranks rounded up to a
    multiple of 16."""
    weight = weight + B @ A
    if not bordered:
        return weight
    (outputs, inputs), rank = weight.shape, A.shape[0]
    border = -(-rank // 16) * 16
    result = weight.new_zeros(outputs + border, inputs + border)
    result[:outputs, :inputs] = weight
    result[:outputs, inputs : inputs + rank] = B
    result[outputs : outputs + rank, :inputs] = A
    return result


def make_gradients(x: Tensor, dy: Tensor, ax: Tensor, dy_B: Tensor) -> Tensor:
    """`adapter_gradients` on a GPU, in slabs; elsewhere its definition, as one slab."""
    if kernels.uses_triton(x):
        return kernels.triton_kernels.adapter_gradients(x, dy, ax, dy_B, ax.shape[1])
    return define_gradients(x.float(), dy.float(), ax.float(), dy_B.float())[None]


def define_gradients(x: Tensor, dy: Tensor, ax: Tensor, dy_B: Tensor) -> Tensor:
    """[dA, (dy' A x)'] (ranks, in + out)."""
    return torch.cat([dy_B.t() @ x, ax.t() @ dy], dim=1)


# ------------------------------------------------------------------------------------------------------------
# 1: operators

# ‖error‖ / ‖right‖ that a product of random numbers may have: a few times what its type rounds away. The
# adapters' gradients go through two products.
BOUNDS = {"highest": 1e-5, "TF32": 2e-3, "bfloat16": 2e-2}


def check_operators(check: Check) -> None:
    """LoRALinear, its kernels, attention and a skipped update, on this device, against float64 on the CPU."""
    check_lora_linear(check)
    check_kernels(check)
    check_attention(check)
    check_skipped_update(check)


def get_layers(width: int) -> list[tuple[int, int, list[int]]]:
    """(in, out, ranks of the row parts) of the layers that are checked: qkv, square, wide and narrow ones,
    and sizes and ranks that are no multiples of 8."""
    qkv = [(width, 3 * width, ranks) for ranks in ([8, 16, 64], [64, 8, 32], [2, 33, 0])]
    square = [(width, width, [rank]) for rank in (2, 8, 16, 32, 50, 64)]
    return [*qkv, *square, (width, 4 * width, [64]), (4 * width, width, [20]), (100, 60, [20, 3, 7])]


def check_lora_linear(check: Check) -> None:
    """y, dx, dA, dB and dW of `get_layers`, the worst of them; beside it the error of the plain definition in
    the same precision, for no fast operator should be worse."""
    rows, width = (64, 64) if check.tiny else (500, 1024)
    worst: dict[tuple, float] = {}
    plain: dict[tuple, float] = {}
    for inputs, outputs, ranks in get_layers(width):
        layer = build_lora_linear(inputs, outputs, ranks)
        x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
        right = get_results(layer.double(), x.double(), dy.double(), plainly=True)
        layer = layer.float().to(check.device)
        for precision in BOUNDS:
            exactness = "highest" if precision == "highest" else "high"
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            cast = torch.autocast(check.device.type, torch.bfloat16, enabled=precision == "bfloat16")
            x_here, dy_here = add_gaps(x.to(check.device, dtype)), add_gaps(dy.to(check.device, dtype))
            for trained in (True, False):
                layer.weight.requires_grad_(trained)
                layer.bias.requires_grad_(trained)
                case = precision, "trained" if trained else "frozen"
                with parallel.matmul_precision(exactness), cast:
                    for errors, plainly in ((worst, False), (plain, True)):
                        found = get_results(layer, x_here, dy_here, plainly)
                        error = max(get_error(found[name], right[name]) for name in found)
                        errors[case] = max(errors.get(case, 0.0), error)
    for precision, base in worst:
        error, plain_error, bound = worst[precision, base], plain[precision, base], BOUNDS[precision]
        text = f"{error:.1e}, plainly {plain_error:.1e}, at most {bound:.0e}"
        holds = error <= bound and error <= 2 * plain_error + 1e-6
        check.say(f"LoRALinear, ranks 2 to 64, base {base}, {precision}: error", text, holds)


def build_lora_linear(inputs: int, outputs: int, ranks: list[int]) -> LoRALinear:
    """A layer of `len(ranks)` row parts on the CPU, everything in it random, B too."""
    torch.manual_seed(sum(ranks))
    layer = LoRALinear(inputs, outputs, ranks)
    layer.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
    layer.bias = nn.Parameter(torch.randn(outputs))
    layer.init_adapters(0, "layer")
    with torch.no_grad():
        for B in layer.lora_B.values():
            B.copy_(torch.randn(B.shape))
    return layer


def add_gaps(matrix: Tensor) -> Tensor:
    """The same numbers with gaps between the rows, as a Linear's neighbours in a model may give it."""
    return F.pad(matrix, (0, 8))[:, : matrix.shape[1]]


def get_results(layer: LoRALinear, x: Tensor, dy: Tensor, plainly: bool) -> dict[str, Tensor]:
    """{y, dx and every parameter's gradient} of a layer at x (N, in), for the gradient dy (N, out)."""
    x = x.detach().requires_grad_()  # no clone, which would have no gaps
    if plainly:
        adapters = [(1.0, *layer.adapter(part)) for part in range(len(layer.ranks))]
        y = reference(x, layer.weight, layer.bias, adapters)
    else:
        y = layer(x)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype))
    return {"y": y, "x": gradients[0]} | dict(zip(trained, gradients[1:]))


# ‖error‖ / ‖right‖ of the kernels, by the type of their result or of x: sums are float32's, and only a weight
# is rounded afterwards.
KERNEL_BOUNDS = {
    ("effective_weight", torch.float32): 1e-5,
    ("effective_weight", torch.bfloat16): 4e-3,
    ("adapter_gradients", torch.float32): 1e-5,
    ("adapter_gradients", torch.bfloat16): 1e-5,
}


def check_kernels(check: Check) -> None:
    """`effective_weight` and `adapter_gradients` by themselves, of the same layers, the worst of them."""
    rows, width = (64, 64) if check.tiny else (500, 1024)
    torch.manual_seed(0)
    worst = dict.fromkeys(KERNEL_BOUNDS, 0.0)
    for inputs, outputs, ranks in get_layers(width):
        rank = sum(ranks)
        weight, B, A = torch.randn(outputs, inputs), torch.randn(outputs, rank), torch.randn(rank, inputs)
        sizes = inputs, outputs, rank, rank
        for dtype in (torch.float32, torch.bfloat16):
            x, dy, ax, dy_B = (torch.randn(rows, size).to(dtype) for size in sizes)
            right = define_gradients(x.double(), dy.double(), ax.double(), dy_B.double())
            x, dy, ax, dy_B = (add_gaps(matrix.to(check.device)) for matrix in (x, dy, ax, dy_B))
            error = get_error(make_gradients(x, dy, ax, dy_B).sum(0), right)
            worst["adapter_gradients", dtype] = max(worst["adapter_gradients", dtype], error)
            for bordered in (False, True):
                right = define_weight(weight.double(), B.double(), A.double(), bordered)
                here = (matrix.to(check.device) for matrix in (weight, B, A))
                error = get_error(make_weight(*here, dtype, bordered), right)
                worst["effective_weight", dtype] = max(worst["effective_weight", dtype], error)
    for (name, dtype), bound in KERNEL_BOUNDS.items():
        error = worst[name, dtype]
        text = f"{error:.1e}, at most {bound:.0e}"
        check.say(f"{name}, {str(dtype).removeprefix('torch.')}: error", text, error <= bound)


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
