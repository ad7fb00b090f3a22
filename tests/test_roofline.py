"""benchmarks/roofline.py: kernels, FLOPs and bytes against sums made by hand, and what it leaves alone."""

import contextlib
import dataclasses
import functools
import io
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bench
import data.device
from benchmarks import contenders, fake, roofline
from benchmarks.choices import get_ranks, repeat_noise
from benchmarks.contenders import PHASES
from benchmarks.fake import as_on_a_gpu
from benchmarks.roofline import Ceilings, Kernel, Trace, count_kernels, get_kernels, seconds_by_kind
from data.datasets import DATASETS
from errors import UserError
from lora import kernels, onednn
from lora.layers import LoRALinear
from lora.ranks import Ranks
from model import vit
from model.variants import VARIANTS
from monitor.perf import count_flops
from train import Config, build_on_meta

CPU = torch.device("cpu")
DIM, DEPTH, TOKENS, IMAGES = 64, 2, 197, 4
TI = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "patch_size": 16}
RANKS: Ranks = {family: [4, 8] for family in ("q", "k", "v", "proj", "fc1", "fc2")}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(VARIANTS, "Ti/16", TI)


def get_cfg(**fields) -> Config:
    return Config(**{"model": "Ti/16", "dataset": "imagenet", **fields})


def count_anew(phase="full", **fields) -> list[Kernel]:
    return count_kernels(get_cfg(**fields), phase, RANKS, IMAGES)


count = functools.cache(count_anew)


def total(counted, field, *kinds):
    return sum(getattr(kernel, field) for kernel in counted if not kinds or kernel.kind in kinds)


def watch(function, fused=True, ranks=0) -> list[tuple]:
    """(name, kind, flops, bytes) of the kernels of function(), with adapters of so many ranks."""
    with Trace(ranks) as trace:
        if fused:
            trace.begin_graph()
        trace.keep(function())
    return [(kernel.name, kernel.kind, kernel.flops, kernel.bytes) for kernel in get_kernels(trace)]


# ------------------------------------------------------------------------------------------------------------
# by hand


def test_a_linear_by_hand():
    """dy x and its like in bfloat16, 2 bytes each: (N, in) = (6, 4), (out, in) = (8, 4)."""
    N, n_in, n_out = 6, 4, 8
    x = torch.randn(N, n_in, dtype=torch.bfloat16, requires_grad=True)
    linear = nn.Linear(n_in, n_out, dtype=torch.bfloat16)
    dy = torch.randn(N, n_out, dtype=torch.bfloat16)
    flops, moved = 2 * N * n_in * n_out, 2 * (N * n_in + n_in * n_out + N * n_out)
    assert watch(lambda: torch.autograd.grad(linear(x), (x, linear.weight, linear.bias), dy)) == [
        ("addmm 6×4×8", "products", flops, moved + 2 * n_out),
        ("mm 6×8×4", "products", flops, moved),
        ("mm 8×6×4", "products", flops, moved),
        ("sum", "elementwise", 0, 2 * (N * n_out + n_out)),
    ]


def test_a_product_that_adds_reads_what_it_adds_to():
    y, a, b = torch.zeros(6, 9), torch.zeros(6, 2), torch.zeros(2, 3)
    flops, moved = 2 * 6 * 2 * 3, 4 * (6 * 2 + 2 * 3 + 2 * 6 * 3)
    assert watch(lambda: y[:, 3:6].addmm_(a, b)) == [("addmm_ 6×2×3", "products", flops, moved)]


def test_an_elementwise_chain_by_hand():
    """Read: a and the row b, once each; written: y, which the product needs, and s, which is returned."""
    a, b, weight = torch.zeros(10, 16), torch.zeros(16), torch.zeros(16, 2)

    def chain():
        y = F.gelu(a + b.expand(10, 16)) * a
        s = y.sum(1)
        y.mean()  # nobody wants it, but it takes part in the pass
        return s, y.view(16, 10).t() @ weight

    one_pass, product = watch(chain)
    assert one_pass == ("add, gelu, mul, sum, mean", "elementwise", 0, 4 * (160 + 16 + 160 + 10))
    assert product[0] == "mm 10×16×2"
    # Control: apart, each reads and writes on its own.
    apart = watch(chain, fused=False)
    assert [kernel[0] for kernel in apart] == ["add", "gelu", "mul", "sum", "mean", "mm 10×16×2"]
    assert [kernel[3] // 4 for kernel in apart[:-1]] == [336, 320, 480, 170, 161]


def test_what_shares_no_tensor_is_no_pass_of_its_neighbour():
    weight, x = torch.zeros(4, 4), torch.zeros(8)
    found = watch(lambda: (weight.bfloat16(), x + 1))
    assert found == [("_to_copy", "casts", 0, 16 * (4 + 2)), ("add", "elementwise", 0, 2 * 8 * 4)]


def test_layer_norm_reads_twice_for_its_own_gradients():
    x, dy = torch.zeros(5, 8, requires_grad=True), torch.zeros(5, 8)
    norm = nn.LayerNorm(8)
    y = norm(x)
    frozen = watch(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    read, written = 4 * (2 * 5 * 8 + 2 * 5 + 2 * 8), 4 * 5 * 8  # dy, x, mean and 1 / σ, weight and bias
    assert [kernel[3] for kernel in frozen] == [read + written]
    trained = watch(lambda: torch.autograd.grad(y, (x, norm.weight, norm.bias), dy))
    assert [kernel[3] for kernel in trained] == [read, read + written + 4 * 2 * 8]


@pytest.mark.parametrize("n_in, n_out, rank, border", [(16, 24, 3, 16), (24, 16, 8, 16), (24, 40, 11, 16)])
def test_an_adapted_linear_by_hand(n_in, n_out, rank, border):
    """x and dy in bfloat16, the rest in float32. B and A stand at the sum's borders, in a multiple of 16
    columns and rows; y comes with A x, dx with dy B."""
    N, bfloat16 = 12, torch.bfloat16
    with as_on_a_gpu(), FakeTensorMode():
        layer = LoRALinear.from_linear(nn.Linear(n_in, n_out, bias=False), [rank])
        layer.weight.requires_grad_(False)
        x, dy = (
            torch.randn(N, n_in, dtype=bfloat16, requires_grad=True),
            torch.randn(N, n_out, dtype=bfloat16),
        )
        inputs = (x, layer.lora_A, layer.lora_B["0"])
        with torch.autocast("cpu", bfloat16):
            found = watch(lambda: torch.autograd.grad(layer(x), inputs, dy), ranks=rank)
    effective, wide = (n_out + border) * (n_in + border), n_in + n_out
    summed = ("effective_weight", "adapters", 2 * n_out * rank * n_in)
    y = (f"mm {N}×{n_in}×{n_out + border}", "products", 2 * N * n_in * (n_out + border))
    dx = (f"mm {N}×{n_out}×{n_in + border}", "products", 2 * N * n_out * (n_in + border))
    gradients = ("adapter_gradients", "adapters", 2 * N * border * wide)
    copied = [("clone", "elementwise", 0, 2 * 2 * N * border)] * (n_out < n_in)  # A x, so that y may go
    assert found[: 4 + len(copied)] == [
        (*summed, 4 * (n_out * n_in + rank * wide) + 2 * effective),
        (*y, 2 * (N * n_in + n_in * (n_out + border) + N * (n_out + border))),
        *copied,
        (*dx, 2 * (N * n_out + n_out * (n_in + border) + N * (n_in + border))),
        (*gradients, 2 * N * (wide + 2 * border) + 4 * rank * wide),  # written in one slab, float32
    ]
    assert {kind for _, kind, _, _ in found[4 + len(copied) :]} == {"elementwise"}  # adds up the slabs


@pytest.mark.parametrize("gap", [0, 8])
def test_attention_copies_a_gradient_with_gaps_between_its_rows(gap):
    B, N, H, d = 2, 5, 3, 4
    q, k, v = (torch.randn(B, N, H, d).transpose(1, 2).requires_grad_() for _ in range(3))
    dy = torch.randn(B, N, H * d + gap)[..., : H * d].unflatten(2, (H, d)).transpose(1, 2)  # (B, H, N, d)
    y = F.scaled_dot_product_attention(q, k, v)
    ((name, kind, _, moved),) = watch(lambda: torch.autograd.grad(y, (q, k, v), dy))
    assert kind == "attention" and "backward" in name
    # q, k, v, y, dy and the log-sum; dq, dk, dv; and, only with a gap, dy once more in and out
    assert moved == 4 * (8 * B * N * H * d + B * H * N) + (2 * 4 * B * N * H * d if gap else 0)


def test_seconds_by_hand():
    ceilings = Ceilings(matmul=100.0, bandwidth=10.0)
    found = [Kernel("a", "products", 500, 10), Kernel("b", "products", 10, 30), Kernel("c", "casts", 0, 40)]
    seconds = seconds_by_kind(found, ceilings)
    assert seconds == {**dict.fromkeys(roofline.KINDS, 0.0), "products": 8.0, "casts": 4.0}
    h100 = roofline.get_ceilings("h100")
    assert (h100.matmul, h100.bandwidth) == pytest.approx((0.7 * 989e12, 0.8 * 3.35e12))


# ------------------------------------------------------------------------------------------------------------
# a step


LINEARS = {
    "qkv": (DIM, 3 * DIM, 3),
    "proj": (DIM, DIM, 1),
    "fc1": (DIM, 4 * DIM, 1),
    "fc2": (4 * DIM, DIM, 1),
}


def get_flops_of_the_borders() -> int:
    """What a GPU multiplies more than a CPU in the LoRA phase: zeros in the borders, and of qkv's dy B and dB
    the blocks that are zero or nobody's."""
    more = 0
    for rank in (4, 8):
        for n_in, n_out, parts in LINEARS.values():
            ranks = parts * rank
            border = -(-ranks // 16) * 16
            more += n_in * (border - ranks)  # A x
            more += n_out * border - n_out * rank  # dy B
            more += n_in * (border - ranks)  # dA
            more += n_out * border - n_out * rank  # dB
    return 2 * IMAGES * TOKENS * more


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("phase", PHASES)
def test_flops_are_torch_s(phase, dtype):
    """train.py's count has attention's backward in four products. A fused kernel takes a fifth: it makes the
    scores anew."""
    counted = count(phase, dtype=dtype)
    images = torch.empty(IMAGES, 3, 224, 224, device="meta")
    flops = count_flops(build_on_meta(get_cfg(), phase, RANKS), images)
    scores = DEPTH * 2 * IMAGES * TOKENS**2 * DIM
    assert total(counted, "flops", "attention") == 7 * scores
    more = scores + (get_flops_of_the_borders() if phase == "lora" else 0)
    assert (total(counted, "flops") - more) // IMAGES == flops


def test_products_are_those_that_torch_sees_in_a_real_step():
    cfg = get_cfg(dtype="float32")
    with torch.compiler.set_stance("force_eager"):
        contender = contenders.build_contender(
            "full", cfg, RANKS, CPU, repeat_noise(cfg.dataset, IMAGES, CPU)
        )
        with FlopCounterMode(display=False) as counter:
            contender.step()
    assert total(count(), "flops", "products") == counter.get_total_flops()


def test_adamw_moves_28_bytes_a_trained_parameter():
    for phase in PHASES:
        trained = [p for p in build_on_meta(get_cfg(), phase, RANKS).parameters() if p.requires_grad]
        adamw = [kernel for kernel in count(phase) if kernel.name == "_fused_adamw_"]
        # and it reads each one's step, and in each group whether to skip
        scalars = 4 * len(trained) + 4 * len(adamw)
        assert total(adamw, "bytes") == 28 * sum(p.numel() for p in trained) + scalars
        clip = total(count(phase), "bytes", "optimizer") - total(adamw, "bytes")
        assert clip == pytest.approx(12 * sum(p.numel() for p in trained), rel=0.02)


def test_the_adapters_kernels():
    """Each of the four Linears of a block: W + B A; in warmup two products with dW, in LoRA one kernel for
    both gradients, and dy B by itself for proj, which is square, and for the first qkv, which has no dx."""
    names = {phase: [k.name.split()[0] for k in count(phase) if k.kind == "adapters"] for phase in PHASES}
    assert names["full"] == []
    assert Counter(names["warmup"]) == {"effective_weight": 4 * DEPTH, "mm": 2 * 4 * DEPTH}
    kernels_of_lora = {"effective_weight": 4 * DEPTH, "adapter_gradients": 4 * DEPTH, "mm": DEPTH + 1}
    assert Counter(names["lora"]) == kernels_of_lora
    N, R, n_out = IMAGES * TOKENS, 3 * 8, 3 * DIM  # of the last block's qkv
    border = 32
    moved = 4 * (n_out * DIM + R * (n_out + DIM)) + 2 * (n_out + border) * (DIM + border)
    assert count("lora").count(Kernel("effective_weight", "adapters", 2 * n_out * R * DIM, moved)) == 1
    slabs = math.ceil(N / 64)
    moved = 2 * N * (DIM + n_out + 2 * border) + 4 * slabs * R * (DIM + n_out)
    gradients = Kernel("adapter_gradients", "adapters", 2 * N * border * (DIM + n_out), moved)
    assert count("lora").count(gradients) == 1


def test_attention_gets_no_gradient_with_gaps():
    """proj's dx is a product of its own: attention moves in LoRA what it moves in full."""
    assert total(count("lora"), "bytes", "attention") == total(count("full"), "bytes", "attention")


def test_weights_are_cast_where_they_are_trained():
    """In every forward to bfloat16, and their gradients back: 2 × 6 bytes each. Under adapters it is their
    sum that is cast, and where it is made."""
    products = DEPTH * 12 * DIM * DIM
    casts = {phase: total(count(phase), "bytes", "casts") for phase in PHASES}
    assert casts["full"] - casts["lora"] > 0.9 * 12 * products
    assert total(count("full", dtype="float32"), "bytes", "casts") < casts["lora"]


def test_checkpointing_goes_through_the_blocks_twice():
    once, twice = count(), count(activation_checkpointing="block")
    assert total(twice, "flops", "attention") == 9 / 7 * total(once, "flops", "attention")
    fused = [sum("native_layer_norm, _to_copy" in kernel.name for kernel in found) for found in (once, twice)]
    assert fused == [2 * DEPTH, 4 * DEPTH]  # both times compiled
    with pytest.raises(UserError, match="selective"):
        count(activation_checkpointing="selective")


@pytest.mark.parametrize("phase", PHASES)
def test_micro_batches_are_all_counted(phase):
    assert total(count(phase, grad_accum_steps=3), "flops") == 3 * total(count(phase), "flops")


# ------------------------------------------------------------------------------------------------------------
# controls


def test_control_a_pass_more_is_its_bytes_more(monkeypatch):
    """One that copies the patches, in bfloat16, outside the blocks; and one inside, between two products."""
    before, forward = total(count(), "bytes", "elementwise"), vit.PatchEmbed.forward
    with monkeypatch.context() as patch:
        patch.setattr(vit.PatchEmbed, "forward", lambda self, x: forward(self, x).clone())
        after = total(count_anew(), "bytes", "elementwise")
    assert after - before == 2 * 2 * IMAGES * (TOKENS - 1) * DIM

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: 2 * attend(q, k, v))
    after = total(count_anew(), "bytes", "elementwise")
    assert after - before == 2 * DEPTH * 2 * 2 * IMAGES * TOKENS * DIM  # forward and backward


def test_control_what_the_compiler_fuses_is_free(monkeypatch):
    before, gelu = total(count(), "bytes"), F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: 2 * gelu(x))
    assert total(count_anew(), "bytes") == before


@pytest.mark.parametrize("name", ["effective_weight", "adapter_gradients"])
def test_control_the_operator_is_what_is_counted(monkeypatch, name):
    """A kernel that is launched twice is counted twice."""
    before, launch = count("lora"), getattr(kernels.triton_kernels, name)

    def twice(*args):
        launch(*args)
        return launch(*args)

    monkeypatch.setattr(kernels.triton_kernels, name, twice)
    after = count_anew("lora")
    own = [kernel for kernel in before if kernel.name == name]
    for field in ("flops", "bytes"):
        assert total(after, field, "adapters") - total(before, field, "adapters") == total(own, field) > 0


def test_control_a_cpu_s_way_is_not_what_is_counted(monkeypatch):
    """Without Triton's kernels the products with N rows are more, and they are not one kernel."""
    monkeypatch.setattr(fake, "find_spec", lambda name: None)
    names = {kernel.name for kernel in count_anew("lora")}
    assert "adapter_gradients" not in names and "effective_weight" not in names


def test_without_triton_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(roofline, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed"):
        count_anew("lora")


def test_nothing_stays_behind(monkeypatch):
    spec = DATASETS["imagenet"]._replace(mean=(0.4, 0.5, 0.6))  # these are tensors, which are cached
    monkeypatch.setitem(DATASETS, "imagenet", spec)

    def look():
        torch_s = torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()
        precision = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
        road = kernels.uses_triton(torch.zeros(1)), onednn.IS_FASTER
        return torch_s, precision, road, onednn.OneDNNLinear.forward, data.device._get_constants.cache_info()

    before, cfg = look(), get_cfg()
    count_anew("lora", dtype="float32")
    count_anew("lora")
    assert look() == before and cfg == get_cfg()
    assert type(data.device._get_constants(spec.mean, spec.std, CPU)[0]) is torch.Tensor


# ------------------------------------------------------------------------------------------------------------
# the command


def run_main(argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = bench.main(argv.split())
    return status, out.getvalue(), err.getvalue()


def test_command():
    status, out, err = run_main("roofline --model Ti/16 --batch_size 4 --ranks 8 --matmul 100 --bandwidth 10")
    assert status == 0, err
    assert out.startswith("COUNTED, nothing below was measured") and "100 TFLOP/s and 10 GB/s" in out
    rows = {line[:18].strip(): line[18:].replace("|", "").split() for line in out.splitlines() if "|" in line}
    assert set(rows) == {*PHASES, "lora, 1 frozen", ""}
    for title in [*PHASES, "lora, 1 frozen"]:
        step, ratio, _, moved, kernel_count, *kinds = map(float, rows[title])
        assert sum(kinds) == pytest.approx(step, abs=0.5) and kernel_count > 50
        assert step > 1e3 * moved / 10 * 0.9 - 5 and ratio > 0


@pytest.mark.parametrize("argv", ["--batch_size 0", "--matmul 0", "--bandwidth -1", "--freeze_blocks 12"])
def test_mistakes_are_one_sentence(argv):
    status, _, err = run_main(f"roofline --model Ti/16 {argv}")
    assert status == 2 and "must be above 0" in err and err.count("\n") == 1


def test_a_large_model_s_phases():
    """What freezing the base of L/16 may win on a GPU, and half its blocks, and a narrow residual stream;
    what adapters beside a trained base may cost."""
    least = {  # of full / it: A100, H100
        ("float32", "warmup"): (0.97, 0.97),
        ("float32", "lora"): (1.36, 1.34),
        ("float32", "lora, 12 frozen"): (1.9, 1.9),
        ("bfloat16", "lora"): (1.38, 1.35),
    }
    for (residual_dtype, row), bounds in least.items():
        for device, bound in zip(("a100-40gb", "h100"), bounds):
            seconds = count_large(residual_dtype)
            ceilings = roofline.get_ceilings(device)
            full, its = (sum(seconds_by_kind(seconds[title], ceilings).values()) for title in ("full", row))
            print(f"{device}, residual stream {residual_dtype}, full / {row}: {full / its:.3f}")
            assert full / its >= bound


@functools.cache
def count_large(residual_dtype):
    """The kernels of L/16's phases, and of its LoRA phase with half the blocks frozen."""
    cfg, ranks = get_cfg(model="L/16", residual_dtype=residual_dtype), get_ranks("mixed", "L/16")
    counted = {phase: count_kernels(cfg, phase, ranks, 64) for phase in PHASES}
    kept = {family: [0] * 12 + layers[12:] for family, layers in ranks.items()}
    frozen = dataclasses.replace(cfg, freeze_blocks=12)
    return counted | {"lora, 12 frozen": count_kernels(frozen, "lora", kept, 64)}
