"""benchmarks/roofline.py: kernels, FLOPs and bytes against sums made by hand, and what it leaves alone."""

import contextlib
import functools
import io
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bench
import data.device
from benchmarks import contenders, roofline
from benchmarks.choices import get_ranks, repeat_noise
from benchmarks.contenders import PHASES
from benchmarks.roofline import Ceilings, Kernel, Trace, count_kernels, get_kernels, seconds_by_kind
from data.datasets import DATASETS
from errors import UserError
from lora import kernels, onednn
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


def watch(function, fused=True) -> list[tuple]:
    """(name, kind, flops, bytes) of the kernels of function()."""
    with Trace() as trace:
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


def test_seconds_by_hand():
    ceilings = Ceilings(matmul=100.0, bandwidth=10.0)
    found = [Kernel("a", "products", 500, 10), Kernel("b", "products", 10, 30), Kernel("c", "casts", 0, 40)]
    seconds = seconds_by_kind(found, ceilings)
    assert seconds == {**dict.fromkeys(roofline.KINDS, 0.0), "products": 8.0, "casts": 4.0}
    h100 = roofline.get_ceilings("h100")
    assert (h100.matmul, h100.bandwidth) == pytest.approx((0.7 * 989e12, 0.8 * 3.35e12))


# ------------------------------------------------------------------------------------------------------------
# a step


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
    assert total(counted, "flops") == flops + scores


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


def test_the_adapters_products():
    """Forward A x and + (A x) B', backward dy B, dA, dB and dx += (dy B) A; qkv has three B. In lora the last
    is spared below the first Linear."""
    for phase, spared in (("warmup", 0), ("lora", 1)):
        adapters = [kernel for kernel in count(phase) if kernel.kind == "adapters"]
        assert len(adapters) == DEPTH * ((1 + 3 + 3 + 1 + 3 + 1) + 3 * 6) - spared
    assert total(count("full"), "flops", "adapters") == 0
    N, R = IMAGES * TOKENS, 3 * 8  # x, A and A x of the last block's qkv
    ax = Kernel(f"mm {N}×{DIM}×{R}", "adapters", 2 * N * DIM * R, 2 * (N * DIM + DIM * R + N * R))
    assert adapters.count(ax) == 1


def test_weights_are_cast_where_they_are_trained():
    """In every forward to bfloat16, and their gradients back: 2 × 6 bytes each. Frozen ones are cast once."""
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


def test_micro_batches_are_all_counted():
    assert total(count(grad_accum_steps=3), "flops") == 3 * total(count(), "flops")


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


def test_control_the_operator_is_what_is_counted(monkeypatch):
    """An A x that is made twice is counted twice."""
    before, init = total(count("lora"), "flops", "adapters"), kernels.prepare._init_fn

    def twice(*args):
        init(*args)
        return init(*args)

    monkeypatch.setattr(kernels.prepare, "_init_fn", twice)
    ax = 0
    for rank in (4, 8):
        ax += 2 * IMAGES * TOKENS * rank * (3 * DIM + DIM + DIM + 4 * DIM)
    assert total(count_anew("lora"), "flops", "adapters") - before == ax


def test_nothing_stays_behind(monkeypatch):
    spec = DATASETS["imagenet"]._replace(mean=(0.4, 0.5, 0.6))  # these are tensors, which are cached
    monkeypatch.setitem(DATASETS, "imagenet", spec)

    def look():
        torch_s = torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()
        precision = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
        exact = kernels.is_exact(torch.zeros(1)), onednn.takes(torch.zeros(1))
        return torch_s, precision, exact, onednn.OneDNNLinear.forward, data.device._get_constants.cache_info()

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
    rows = {line.split()[0]: line.replace("|", "").split()[1:] for line in out.splitlines() if "|" in line}
    assert set(PHASES) < set(rows)
    for phase in PHASES:
        step, ratio, _, moved, kernel_count, *kinds = map(float, rows[phase])
        assert sum(kinds) == pytest.approx(step, abs=0.5) and kernel_count > 50
        assert step > 1e3 * moved / 10 * 0.9 - 5 and ratio > 0


@pytest.mark.parametrize("argv", ["--batch_size 0", "--matmul 0", "--bandwidth -1"])
def test_mistakes_are_one_sentence(argv):
    status, _, err = run_main(f"roofline --model Ti/16 {argv}")
    assert status == 2 and "must be above 0" in err and err.count("\n") == 1


def test_a_large_model_is_counted_in_seconds():
    """24 blocks × (12 + 3 × 6) products of adapters, and a LoRA step of what a list by hand gave."""
    start = time.perf_counter()
    counted = count_kernels(get_cfg(model="L/16"), "lora", get_ranks("mixed", "L/16"), 64)
    seconds = time.perf_counter() - start
    print(f"L/16 in {seconds:.1f} s")
    assert seconds < 60
    assert sum(kernel.kind == "adapters" for kernel in counted) == 24 * 30 - 1
    for device, by_hand in (("a100-40gb", 0.1370), ("h100", 0.0533)):
        step = sum(seconds_by_kind(counted, roofline.get_ceilings(device)).values())
        assert step == pytest.approx(by_hand, rel=0.01)
