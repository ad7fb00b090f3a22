"""lora/: the operator against its reference, adapters against PEFT, insertion, merge, freezing, mistakes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora import kernels, onednn
from lora.inject import (
    add_lora,
    drop_ranks,
    freeze,
    freeze_base,
    get_adapter_names,
    init_adapters,
    mark_ranks_dynamic,
    match_families,
    merge_lora,
    rank_costs,
)
from lora.layers import LoRALinear, get_scaling, reference
from lora.onednn import OneDNNLinear, use_onednn
from model.variants import LORA_FAMILIES, LORA_REST, VARIANTS, get_lowest
from model.vit import VisionTransformer

ALL = tuple(LORA_FAMILIES)
# of the small ViT's two blocks
MIXED = {"q": [2, 4], "k": [8, 1], "v": [4, 4], "proj": [1, 2], "fc1": [8, 4], "fc2": [2, 8]}


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
    monkeypatch.setattr(onednn, "IS_FASTER", False)  # but in the tests that have the fixture `products`
    monkeypatch.setitem(VARIANTS, "small", dict(embed_dim=24, depth=2, num_heads=2, patch_size=4))
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def products(small_variant, request, monkeypatch):
    """Both kinds of machine: where oneDNN's products are taken, and where they are not."""
    monkeypatch.setattr(onednn, "IS_FASTER", request.param)
    return request.param


@pytest.fixture
def no_fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def build_vit(ranks=None, alpha=None):
    model = VisionTransformer("small", 8, 5)
    model.init_weights(0)
    nn.init.normal_(
        model.head.weight, generator=torch.Generator().manual_seed(0)
    )  # zero, every logit would be 0
    if ranks:
        add_lora(model, match_families(model, LORA_FAMILIES, tuple(ranks)), ranks, alpha)
        init_adapters(model, 0)
    return model


@torch.no_grad()
def randomise_B(model):
    for name, p in model.named_parameters():
        if ".lora_B." in f".{name}":
            p.normal_()
    return model


def assert_close(got, expected):
    """Equal to float32's rounding, on the scale of the whole tensor: single elements may be small by
    cancellation."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))


# ---- PEFT


class Plain(nn.Module):
    """Separate q, k, v, and a fc: what our fused Linear with three row parts and a whole one are compared
    with."""

    def __init__(self, fused, fc, bias):
        super().__init__()
        rows = fused.out_features // 3
        for i, name in enumerate("qkv"):
            linear = nn.Linear(fused.in_features, rows, bias=bias)
            linear.weight.data = fused.weight.data[i * rows : (i + 1) * rows].clone()
            if bias:
                linear.bias.data = fused.bias.data[i * rows : (i + 1) * rows].clone()
            setattr(self, name, linear)
        self.fc = copy.deepcopy(fc)

    def forward(self, x):
        return self.fc(torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1).sin())


class Ours(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).sin())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha, rule", [(None, "alpha"), (16.0, "alpha"), (3.0, "alpha"), (16.0, "rslora")])
@pytest.mark.parametrize(
    "ranks", [{"q": 2, "k": 4, "v": 8, "fc": 3}, {"q": 5, "v": 1}], ids=["all", "q and v"]
)
def test_equals_peft(bias, alpha, rule, ranks):
    from peft import LoraConfig, get_peft_model

    ours = Ours(nn.Linear(12, 24, bias=bias), nn.Linear(24, 10, bias=bias))
    # lora_alpha=None is alpha = rank here; PEFT has to be told
    config = LoraConfig(
        r=1,
        lora_alpha=alpha or 1,
        target_modules=list(ranks),
        rank_pattern=ranks,
        lora_dropout=0.0,
        bias="none",
        alpha_pattern={} if alpha else ranks,
        use_rslora=rule == "rslora",
    )
    peft = get_peft_model(Plain(ours[0], ours[1], bias), config)
    base = peft.base_model.model
    families = {"q": [("0", 0, 3)], "k": [("0", 1, 3)], "v": [("0", 2, 3)], "fc": [("1", 0, 1)]}
    add_lora(ours, families, {family: [rank] for family, rank in ranks.items()}, alpha, rule)
    init_adapters(ours, 0)
    randomise_B(ours)
    freeze_base(ours)

    def parts(read_A, read_B):
        """(theirs, ours) of each adapter, our A cut out of the stacked matrix."""
        for family in ranks:
            (name, part, _), theirs = families[family][0], getattr(base, family)
            module = ours.get_submodule(name)
            start = sum(module.ranks[:part])
            yield (
                read_A(theirs.lora_A["default"].weight),
                read_A(module.lora_A)[start : start + ranks[family]],
            )
            yield read_B(theirs.lora_B["default"].weight), read_B(module.lora_B[str(part)])

    for theirs, mine in parts(lambda p: p.data, lambda p: p.data):
        theirs.copy_(mine)
    x = torch.randn(2, 7, 12)
    x_ours, x_peft = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = ours(x_ours), peft(x_peft)
    assert_close(got, expected)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(x_ours.grad, x_peft.grad)
    for theirs, mine in parts(lambda p: p.grad, lambda p: p.grad):
        assert theirs.any()
        assert_close(mine, theirs)
    merged = merge_lora(copy.deepcopy(ours))
    theirs = peft.merge_and_unload()
    assert_close(merged[0].weight.data, torch.cat([getattr(theirs, n).weight.data for n in "qkv"]))
    assert_close(merged[1].weight.data, theirs.fc.weight.data)
    assert not torch.allclose(
        merged[0].weight[:8], ours[0].weight[:8], atol=1e-2
    )  # control: the adapters matter


# ---- the scaling


@pytest.mark.parametrize(
    "rule, alpha, expected",
    [
        ("authors", None, 1.0),
        ("alpha", None, 1.0),
        ("alpha", 64.0, 8.0),  # 64 / 8
        ("rslora", 64.0, 64 / math.sqrt(8)),
        ("matched", None, math.sqrt(3 * 96 / 8)),  # 6
        ("matched", 0.5, 3.0),
        ("coherent", None, math.sqrt(3) * 96 / 8),
        ("coherent", 2.0, math.sqrt(3) * 24),
    ],
)
def test_the_scalings_by_hand(rule, alpha, expected):
    """Rank 8 on 96 inputs."""
    assert get_scaling(rule, alpha, 8, 96) == pytest.approx(expected, rel=1e-12)
    linear = LoRALinear(96, 32, [8, 0], alpha, rule)
    assert linear.get_scaling(8) == pytest.approx(expected, rel=1e-12)
    if linear.scaling is not None:
        torch.testing.assert_close(linear.scaling, torch.full((8, 1), expected))
    with pytest.raises(ValueError, match="unknown scaling 'none'"):
        get_scaling("none", alpha, 8, 96)


def get_steps_of_both(rule, rank, rows, alpha=None, dtype=torch.float64):
    """(ΔW of a Linear's first Adam step, W + s B A after its adapter's minus before), and the inputs, for
    320 inputs and 192 outputs. One row of input: its direction alone; many: a random gradient."""
    torch.manual_seed(1)
    x, target = torch.randn(rows, 320, dtype=dtype), torch.randn(rows, 192, dtype=dtype)
    steps = []
    for adapted in (False, True):
        linear = nn.Linear(320, 192, dtype=dtype)
        nn.init.zeros_(linear.weight)
        net = nn.Sequential(linear)
        if adapted:
            add_lora(net, {"fc": [("0", 0, 1)]}, {"fc": [rank]}, alpha, rule)
            init_adapters(net, 0)
            freeze_base(net)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, eps=1e-30)
        ((net(x) - target) ** 2).sum().backward()
        optimizer.step()
        steps.append(merge_lora(net)[0].weight.detach())
    return *steps, x


def get_rms(tensor):
    return tensor.square().mean().sqrt().item()


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_a_matched_first_step_is_as_long_as_a_full_one(rank):
    """By its root mean square; without scaling it is √(rank / 3n) of that, 6 to 26 % here."""
    full, matched, _ = get_steps_of_both("matched", rank, 500)
    assert get_rms(full) == pytest.approx(1e-3, rel=1e-6)
    assert get_rms(matched) == pytest.approx(get_rms(full), rel=0.1)
    _, plain, _ = get_steps_of_both("authors", rank, 500)
    assert get_rms(plain) == pytest.approx(math.sqrt(rank / 960) * get_rms(full), rel=0.1)
    _, coherent, _ = get_steps_of_both("coherent", rank, 500)
    assert get_rms(coherent) == pytest.approx(math.sqrt(320 / rank) * get_rms(full), rel=0.1)


@pytest.mark.parametrize("rank", [16, 64])
def test_a_coherent_first_step_does_to_its_input_what_a_full_one_does(rank):
    """Of one input: how far the outputs are moved. The matched step, as long, moves them by √(rank / n)."""
    full, coherent, x = get_steps_of_both("coherent", rank, 1)
    ratio = (coherent @ x[0]).norm() / (full @ x[0]).norm()
    assert ratio.item() == pytest.approx(1.0, rel=0.25)  # ‖A x‖₁ is a sum of `rank` numbers only
    _, matched, _ = get_steps_of_both("matched", rank, 1)
    assert (matched @ x[0]).norm() / (coherent @ x[0]).norm() == pytest.approx(
        math.sqrt(rank / 320), rel=1e-6
    )


def test_all_layers_have_a_scaling_or_none():
    """Where one had none, it would have another graph: also where alpha / rank happens to be 1."""
    for rule, alpha, is_there in (("alpha", 8.0, True), ("authors", None, False), ("matched", None, True)):
        for rank in (4, 8):
            assert (LoRALinear(24, 24, [rank], alpha, rule).scaling is not None) == is_there


# ---- the operator


def by_reference(x, linear):
    """The plain lines on the module's own parameters: autograd finds the gradients."""
    adapters, start = [], 0
    for part, rank in enumerate(linear.ranks):
        A = linear.lora_A[start : start + rank]
        B = linear.lora_B[str(part)] if rank else A.new_empty(linear.out_features // len(linear.ranks), 0)
        s = linear.alpha / rank if linear.alpha and rank else 1.0
        adapters.append((s, B, A))
        start += rank
    return reference(x, linear.weight, linear.bias, adapters)


def build_linear(ranks, dtype=torch.float32, alpha=None, bias=True):
    linear = LoRALinear.from_linear(nn.Linear(12, 24, bias=bias, dtype=dtype), ranks, alpha)
    linear.init_adapters(0, "")
    return randomise_B(linear)


def test_the_reference_by_hand():
    """Two row parts of one row each, the second without an adapter."""
    x, weight, bias = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        torch.tensor([7.0, 8.0]),
    )
    first = 0.5, torch.tensor([[10.0]]), torch.tensor([[1.0, -1.0]])  # s, B, A: 0.5 · 10 · (1 - 2)
    none = 1.0, torch.empty(1, 0), torch.empty(0, 2)
    assert reference(x, weight, bias, [first, none]).tolist() == [[3 + 8 + 7 - 5, 5 + 12 + 8]]
    assert reference(x, weight, None, [none, none]).tolist() == [[3 + 8, 5 + 12]]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("rows", [40, 5])
@pytest.mark.parametrize(
    "ranks, alpha, bias", [([2, 4, 3], None, True), ([0, 0, 3], 6.0, False), ([5], 2.5, True)]
)
def test_operator_is_the_reference_in_every_type(ranks, alpha, bias, rows, dtype, frozen, products):
    """The reference in float64, from the same numbers: in bfloat16 what differs is rounding."""
    linear = build_linear(ranks, dtype, alpha, bias)
    if frozen:
        freeze_base(linear)
    x = torch.randn(2, rows, 12, dtype=dtype, requires_grad=True)
    exact, x_exact = copy.deepcopy(linear).double(), x.detach().double().requires_grad_()
    got, expected = linear(x), by_reference(x_exact, exact)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(got, expected), (x.grad, x_exact.grad)]
    trained = [(name, p) for name, p in linear.named_parameters() if p.requires_grad]
    pairs += [(p.grad, exact.get_parameter(name).grad) for name, p in trained]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.03}[dtype]
    for mine, theirs in pairs:
        assert theirs.any() and mine.dtype == dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=tolerance * theirs.abs().max().item())
    base = nn.functional.linear(x_exact, exact.weight, exact.bias)
    assert not torch.allclose(base, expected, atol=0.3)  # control: the adapters matter


@pytest.mark.parametrize("rows", [40, 5])
@pytest.mark.parametrize("trained", ["all", "adapters", "weight", "x only", "all but x", "bias and adapters"])
@pytest.mark.parametrize(
    "ranks, alpha, bias", [([2, 4, 3], None, True), ([2, 0, 3], 5.0, True), ([5], 2.0, False)]
)
def test_operator_is_what_it_stands_for(rows, trained, ranks, alpha, bias):
    linear, x = build_linear(ranks, torch.float64, alpha, bias), torch.randn(rows, 12, dtype=torch.float64)
    for name, p in [("x", x), *linear.named_parameters()]:
        adapter = name.startswith("lora_")
        p.requires_grad_(
            {
                "all": True,
                "adapters": adapter or name == "x",
                "weight": name == "weight",
                "x only": name == "x",
                "all but x": name != "x",
                "bias and adapters": adapter or name == "bias",
            }[trained]
        )
    leaves = [p for p in (x, *linear.parameters()) if p.requires_grad]
    got, expected = linear(x), by_reference(x, linear)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    assert len(leaves) > 0
    for mine, theirs in zip(
        *[torch.autograd.grad((out * weights).sum(), leaves) for out in (got, expected)], strict=True
    ):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("frozen", [True, False])
def test_operator_s_gradients_by_differences(frozen):
    linear = build_linear([2, 0, 3], torch.float64)
    if frozen:
        freeze_base(linear)
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: linear(x), (x, *linear.parameters()), fast_mode=True)


def test_part_of_the_gradients_may_be_asked_for():
    linear, x = build_linear([2, 4, 3]), torch.randn(40, 12)
    for wanted in (
        list(linear.lora_B.values()),
        [linear.lora_A],
        [linear.weight],
        [linear.bias],
    ):  # the weight's is not, though it could be
        got, expected = [
            torch.autograd.grad(f(x).square().sum(), wanted)
            for f in (linear, lambda x: by_reference(x, linear))
        ]
        for mine, theirs in zip(got, expected):
            assert_close(mine, theirs)


SIZES = [1e-4, 1e-3, 1e-2, 1e-1]  # of B A, beside W


def build_update(out, inputs, size, rank=16):
    """W (out, in), B and A, with ‖B A‖ = size · ‖W‖."""
    W, B, A = torch.randn(out, inputs), torch.randn(out, rank), torch.randn(rank, inputs)
    return W, B * (size * W.norm() / (B @ A).norm()), A


@pytest.mark.parametrize("size", SIZES)
def test_an_update_arrives_whole_in_bfloat16(size):
    """What a bfloat16 W + B A has more than a bfloat16 W is B A, on average over the elements, however small
    it is beside W's rounding."""
    W, B, A = build_update(4096, 4096, size)
    BA = B @ A

    def share(effective):
        arrived = effective.float() - W.bfloat16().float()
        return ((arrived * BA).sum() / BA.square().sum()).item()

    assert abs(share(kernels.add_product(W, B, A, torch.bfloat16)) - 1) < 0.01
    onto_rounded = share(kernels.add_product(W.bfloat16(), B, A, torch.bfloat16))
    assert (size < 1e-2) == (onto_rounded < 0.9)  # control: 4 % of an update of 1e-4 arrive


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_errors_in_bfloat16_are_no_larger_than_with_separate_products(size, frozen):
    """Of y and of all gradients, against float64, beside W x + B (A x) with each product in bfloat16."""
    W, B, A = build_update(256, 256, size)
    x, dy = torch.randn(2, 500, 256).bfloat16().float()
    linear = LoRALinear(256, 256, [16])
    linear.weight, linear.bias = nn.Parameter(W), nn.Parameter(torch.randn(256))
    linear.lora_A, linear.lora_B["0"] = nn.Parameter(A), nn.Parameter(B)
    if frozen:
        freeze_base(linear)
    names = [name for name, p in linear.named_parameters() if p.requires_grad]

    def compute(function, module, x, dy):
        x = x.clone().requires_grad_()
        y = function(x, module)
        leaves = [x, *(module.get_parameter(name) for name in names)]
        gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return dict(zip(["y", "x", *names], [y, *gradients]))

    exact = compute(by_reference, copy.deepcopy(linear).double(), x.double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = compute(lambda x, module: module(x), linear, x, dy)
        separate = compute(by_reference, linear, x, dy)
    for name, right in exact.items():
        error, others = [(result[name].double() - right).norm().item() for result in (ours, separate)]
        assert 0 < error < 1.05 * others, name


@pytest.mark.parametrize("frozen", [True, False])
def test_operator_under_autocast(frozen):
    linear, x = build_linear([2, 4, 3], alpha=3.0), torch.randn(40, 12, requires_grad=True)
    linear.weight.requires_grad_(not frozen)
    if frozen:
        linear.weight.data = linear.weight.data.bfloat16()
    leaves = [x, *(p for p in linear.parameters() if p.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(x)
        assert got.dtype == torch.bfloat16
    got = torch.autograd.grad(got.float().square().sum(), leaves)
    linear.weight.data = linear.weight.data.float()
    expected = torch.autograd.grad(by_reference(x, linear).square().sum(), leaves)
    for mine, theirs, p in zip(got, expected, leaves):
        assert mine.dtype == p.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.03 * theirs.abs().max().item())


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_kept_for_backward(frozen, first):
    """x, and W + B A if x has a gradient; nothing of y's size."""
    linear, x = build_linear([2, 4, 3]), torch.randn(40, 12, requires_grad=not first)
    linear.weight.requires_grad_(not frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    own = {p.data_ptr() for p in linear.parameters()}
    sizes = sorted(t.numel() for t in kept if t.data_ptr() not in own and t.numel())
    assert sizes == sorted([x.numel()] + ([] if first else [linear.weight.numel()])), sizes


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("strided", [False, True])
def test_operator_compiled(frozen, strided, products):
    """One graph for every rank, strided input and all; what runs eagerly, but for rounding."""
    torch._dynamo.reset()
    x = torch.randn(12, 40).t() if strided else torch.randn(40, 12)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for ranks in ([2, 4, 3], [5, 2, 8], [3, 3, 3]):
        model = nn.Sequential(build_linear(ranks, alpha=5.0))
        if frozen:
            freeze_base(model)
        layers_before = [p.clone() for p in model.parameters()]
        expected = torch.autograd.grad(
            model(x).square().sum(), [p for p in model.parameters() if p.requires_grad]
        )
        mark_ranks_dynamic(model)
        model[0].compile(fullgraph=True)
        got = torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
        for mine, theirs in zip(got, expected):
            assert_close(mine, theirs)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), layers_before))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_operator_compiled_under_autocast(frozen):
    """The same numbers as eagerly: the sum is float32's, and no product inside is cast once more."""
    torch._dynamo.reset()
    model, x = nn.Sequential(build_linear([2, 4, 3], alpha=5.0)), torch.randn(40, 12, requires_grad=True)
    if frozen:
        freeze_base(model)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def compute():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    expected = compute()
    model[0].compile(fullgraph=True)
    for mine, theirs in zip(compute(), expected):
        assert mine.dtype == theirs.dtype and theirs.any()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=4e-3 * theirs.abs().max().item())


def capture_graphs(x):
    """Forward's and backward's graph, as torch.compile's partitioner cuts them, of two adapted Linears with a
    GELU between."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    torch._dynamo.reset()
    graphs = {}
    capture = lambda name: lambda graph, inputs: graphs.setdefault(name, graph)
    model = nn.Sequential(build_linear([5]), nn.GELU(), LoRALinear.from_linear(nn.Linear(24, 12), [5], None))
    freeze_base(model)
    compiled = torch.compile(  # of a Sequential itself torch 2.11 would compile the children, one by one
        lambda x: model(x),
        fullgraph=True,
        backend=aot_autograd(
            fw_compiler=capture("forward"),
            bw_compiler=capture("backward"),
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        ),
    )
    compiled(x).sum().backward()
    return {name: [str(node.target) for node in graph.graph.nodes] for name, graph in graphs.items()}


def test_compiled_forward_leaves_gelu_s_derivative_to_backward():
    """The partitioner keeps fc1's output; e^(-y²/2), the derivative's, is in backward's graph alone."""
    ops = capture_graphs(torch.randn(40, 12))
    assert "aten.exp.default" in ops["backward"] and "aten.exp.default" not in ops["forward"]
    assert "aten.erf.default" in ops["forward"]  # control: GELU is taken apart, and is there


def test_compiled_backward_does_not_make_the_sum_again(monkeypatch):
    """W + B A is made once a forward, and kept: backward's products are dx, dy B, A x, dA and dB, of the
    first Linear without dx."""
    monkeypatch.setattr(onednn, "IS_FASTER", False)
    ops = capture_graphs(torch.randn(40, 12))
    count = lambda graph, name: ops[graph].count(f"aten.{name}.default")
    assert count("forward", "addmm") == 2 + 2 and count("forward", "mm") == 0
    assert count("backward", "addmm") == 0 and count("backward", "mm") == 5 + 4


def test_flops_are_of_what_is_done(products):
    """Forward W + B A and x times it; backward dx and, of N rows, dW where W is trained, else dy B, A x, dA
    and dB. 2 for a multiplication and its addition."""
    linear = build_linear([2, 4, 3])
    N, W, A, B = 40, 24 * 12, 9 * 12, 8 * 9  # B: of each adapter its own rows, elsewhere 24 · 9 with zeros
    for frozen, inputs in ((False, True), (True, True), (True, False)):
        linear.weight.requires_grad_(not frozen)
        x = torch.randn(N, 12, requires_grad=inputs)
        with FlopCounterMode(display=False) as counter:
            linear(x).sum().backward()
        products = 9 * W + N * W + N * W * inputs  # W + B A, y, dx
        products += 2 * N * (A + B) if frozen else N * W + 2 * 9 * W  # dW, B' dW and dW A'
        assert counter.get_total_flops() == 2 * products


def test_rank_0_everywhere_is_the_base():
    linear, x = build_linear([0, 0, 0]), torch.randn(40, 12)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    linear(x).sum().backward()
    assert linear.weight.grad.any()


# ---- insertion


@pytest.mark.parametrize("alpha", [None, 16.0])
@pytest.mark.parametrize("ranks", [MIXED, {"q": [4, 4], "v": [4, 4]}], ids=["all", "q and v"])
def test_insertion_leaves_the_function_unchanged_to_the_bit(ranks, alpha, products):
    base, model, x = use_onednn(build_vit()), use_onednn(build_vit(ranks, alpha)), images()
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
        assert not torch.equal(randomise_B(model)(x), base(x))  # control: the adapters are on the way


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(10, 24), (3, 5, 24), (2, 3, 5, 24), (0, 5, 24), (60, 24), "transposed"])
def test_insertion_to_the_bit_for_any_input(shape, bias, products):
    x = torch.randn(5, 3, 24).transpose(0, 1) if shape == "transposed" else torch.randn(shape)
    model = nn.Sequential(nn.Linear(24, 36, bias=bias))
    use_onednn(model)
    expected = model(x)
    add_lora(model, {"a": [("0", 0, 3)], "c": [("0", 2, 3)]}, {"a": [4], "c": [1]})
    init_adapters(model, 0)
    assert torch.equal(model(x), expected) and model(x).shape == expected.shape
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_base_parameters_stay_the_same_objects_under_the_same_names():
    model = build_vit()
    before = dict(model.named_parameters())
    model.blocks[1].eval()
    add_lora(model, match_families(model, LORA_FAMILIES, ALL), MIXED)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    added = set(after) - set(before)
    assert get_adapter_names(model) == added
    assert added == {
        f"blocks.{i}.{linear}.{p}"
        for i in range(2)
        for linear, parts in [("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 1), ("mlp.fc2", 1)]
        for p in ["lora_A"] + [f"lora_B.{part}" for part in range(parts)]
    }
    assert set(model.state_dict()) == set(after)  # no buffer among the weights
    assert model.blocks[0].attn.qkv.training and not model.blocks[1].attn.qkv.training
    sizes = {"q": 48, "k": 48, "v": 48, "proj": 48, "fc1": 120, "fc2": 120}  # in + out, of rank 1
    assert sum(after[name].numel() for name in added) == sum(
        sizes[family] * sum(r) for family, r in MIXED.items()
    )


def test_only_the_asked_parts_get_an_adapter():
    ranks = {"q": [2, 4], "v": [4, 2]}
    base, model = build_vit(), randomise_B(build_vit(ranks))
    for i, block in enumerate(model.blocks):
        assert block.attn.qkv.ranks == [ranks["q"][i], 0, ranks["v"][i]] and set(block.attn.qkv.lora_B) == {
            "0",
            "2",
        }
        assert all(type(m) is nn.Linear for m in (block.attn.proj, block.mlp.fc1, block.mlp.fc2))
    x = torch.randn(5, 24)
    got, expected = model.blocks[0].attn.qkv(x), base.blocks[0].attn.qkv(x)
    assert torch.equal(got[:, 24:48], expected[:, 24:48])  # k, to the bit
    assert not torch.allclose(got[:, :24], expected[:, :24]) and not torch.allclose(
        got[:, 48:], expected[:, 48:]
    )


def test_ranks_go_to_their_layers_in_the_models_order():
    model = build_vit(MIXED)
    assert [b.attn.qkv.ranks for b in model.blocks] == [[2, 8, 4], [4, 1, 4]]
    assert [b.mlp.fc2.ranks for b in model.blocks] == [[2], [8]]


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_adapters_are_a_pure_function_of_seed_and_name(alpha):
    ranks = {"q": [2, 4], "fc1": [3, 3]}
    first = build_vit(ranks, alpha)
    torch.manual_seed(99)
    second = randomise_B(build_vit({"fc2": [1, 1], **ranks}, alpha))  # another past, another family beside
    state = torch.get_rng_state()
    init_adapters(second, 0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in first.named_parameters():
        if name in get_adapter_names(first):
            assert torch.equal(p, second.get_parameter(name)), name
            bound = 1 / math.sqrt(24)  # Kaiming-uniform(√5): gain √(1/3), bound gain · √(3 / in)
            assert not p.any() if "lora_B" in name else 0.8 * bound < p.abs().max() <= bound, name
    a, b = (block.mlp.fc1.lora_A for block in first.blocks)
    assert not torch.equal(a, b)
    init_adapters(second, 1)
    assert not torch.equal(second.blocks[0].mlp.fc1.lora_A, a)


# ---- merge


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_merge(alpha):
    base, model, x = build_vit(), randomise_B(build_vit(MIXED, alpha)), images()
    with torch.no_grad():
        before = model(x)
    adapters = copy.deepcopy(dict(model.named_modules()))
    assert merge_lora(model) is model
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in base.named_parameters()
    }
    for family, (pattern, part, parts) in LORA_FAMILIES.items():
        for i, rank in enumerate(MIXED[family]):
            name = pattern.replace("*", str(i))
            module, start = adapters[name], sum(adapters[name].ranks[:part])
            BA = (
                module.lora_B[str(part)]
                @ module.lora_A[start : start + rank]
                * (1 if alpha is None else alpha / rank)
            )
            W, W_after = (m.get_submodule(name).weight.chunk(parts)[part] for m in (base, model))
            torch.testing.assert_close(W_after, W + BA, rtol=0, atol=2e-6)
            assert BA.abs().max() > 1e-2  # not vacuous
    with torch.no_grad():
        merged = model(x)
        assert_close(merged, before)
        assert not torch.allclose(merged, base(x), atol=1e-2)
    weights = copy.deepcopy(model.state_dict())
    merge_lora(model)  # a second call finds nothing to do
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_merge_rounds_once():
    """In bfloat16 the product and the sum are float32; only the result is rounded."""
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    W = model[0].weight.float()
    add_lora(model, {"a": [("0", 0, 1)]}, {"a": [8]})
    init_adapters(model, 0)
    randomise_B(model)
    exact = W + model[0].lora_B["0"].float() @ model[0].lora_A.float()
    assert torch.equal(merge_lora(model)[0].weight, exact.bfloat16())


# ---- mistakes


def attempt(model, families, ranks):
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    with pytest.raises(ValueError) as error:
        add_lora(model, families, ranks)
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before  # nothing half done
    return str(error.value)


@pytest.mark.parametrize(
    "ranks, words",
    [
        ({"q": [2, 2], "nope": [2, 2]}, ["'nope'", "matches no Linear"]),
        ({"q": [2, 2], "fc1": [2]}, ["'fc1'", "2 layers", "1 ranks"]),
        ({"q": [2, 2], "fc1": [2, 2, 2]}, ["'fc1'", "2 layers", "3 ranks"]),
        ({"q": [2, 2], "fc1": [2, 25]}, ["blocks.1.mlp.fc1", "25", "min(in, out) = 24"]),
        (
            {"fc1": [2, 2], "k": [2, 25]},
            ["blocks.1.attn.qkv", "25", "min(in, out) = 24"],
        ),  # 24 rows of the fused 72
        ({"q": [2, 2], "fc1": [-1, 2]}, ["'fc1'", "rank -1", "blocks.0.mlp.fc1"]),
        ({"fc1": [2, 2], "q": [2, 2], "again": [2, 2]}, ["'again'", "part 0 of 3 of blocks.0.attn.qkv"]),
        ({"fc1": [2, 2], "q": [0, 0], "again": [2, 2]}, ["'again'", "part 0 of 3 of blocks.0.attn.qkv"]),
        ({"fc1": [2, 2], "halves": [2, 2], "q": [2, 2]}, ["'q'", "blocks.0.attn.qkv"]),
        ({"fc1": [2, 2], "sevenths": [2, 2]}, ["blocks.0.attn.qkv", "7 row parts", "72"]),
        ({"fc1": [2, 2], "norms": [2, 2]}, ["'norms'", "blocks.0.norm1", "LayerNorm"]),
    ],
)
def test_mistakes_are_named_and_change_nothing(ranks, words):
    model = build_vit()
    families = match_families(model, LORA_FAMILIES, ALL)
    families |= {
        "again": families["q"],
        "halves": [(name, 1, 2) for name, _, _ in families["q"]],
        "sevenths": [(name, 1, 7) for name, _, _ in families["q"]],
        "norms": [(f"blocks.{i}.norm1", 0, 1) for i in range(2)],
    }
    message = attempt(model, families, ranks)
    assert all(word in message for word in words), message


def test_empty_family_and_adapters_on_adapters():
    model = build_vit()
    assert "'empty' matches no Linear" in attempt(model, {"empty": []}, {"empty": []})
    families = match_families(model, LORA_FAMILIES, ALL)
    add_lora(model, families, {"q": [2, 2]})
    assert "LoRALinear, not a plain nn.Linear" in attempt(model, families, {"k": [2, 2]})


@pytest.mark.parametrize("kind", [nn.Linear, OneDNNLinear])
def test_a_subclass_is_not_plain_by_inheritance(kind):
    class Halved(kind):
        def forward(self, x):
            return super().forward(x) / 2

    family = {"a": [("0", 0, 1)]}
    assert "Halved, not a plain nn.Linear" in attempt(nn.Sequential(Halved(24, 12)), family, {"a": [2]})
    assert type(add_lora(nn.Sequential(kind(24, 12)), family, {"a": [2]})[0]) is LoRALinear


def test_multihead_attentions_out_proj_is_refused():
    """Its weight is read without the module being called: an adapter there would never run."""
    model = build_encoder()
    families = match_families(
        model, {"out": ("layers.*.out_proj", 0, 1), "up": ("layers.*.linear1", 0, 1)}, ("up",)
    )
    families["out"] = [(f"layers.{i}.self_attn.out_proj", 0, 1) for i in range(2)]
    message = attempt(model, families, {"up": [2, 2], "out": [2, 2]})
    assert all(
        word in message
        for word in ("'out'", "layers.0.self_attn.out_proj", "NonDynamicallyQuantizableLinear")
    )


def test_match_families():
    model = build_vit()
    assert match_families(model, LORA_FAMILIES, ("v", "fc2")) == {
        "v": [("blocks.0.attn.qkv", 2, 3), ("blocks.1.attn.qkv", 2, 3)],
        "fc2": [("blocks.0.mlp.fc2", 0, 1), ("blocks.1.mlp.fc2", 0, 1)],
    }
    with pytest.raises(ValueError, match="unknown target module 'dense', there are: q, k, v, proj, fc1, fc2"):
        match_families(model, LORA_FAMILIES, ("q", "dense"))
    # a prefix that isn't there: what went unnoticed in the authors' code
    prefixed = {"q": ("encoder.blocks.*.attn.qkv", 0, 3)}
    with pytest.raises(ValueError, match=r"'q' \(encoder.blocks.\*.attn.qkv\) matches no Linear"):
        match_families(model, prefixed, ("q",))
    # after insertion, too
    assert match_families(build_vit(MIXED), LORA_FAMILIES, ALL) == match_families(model, LORA_FAMILIES, ALL)


@pytest.mark.parametrize(
    "ranks, message",
    [([7], "rank 7 .* 6"), ([-1], "rank -1"), ([3, 3, 3], "rank 3 .* 2"), ([1] * 4, "4 row parts .* 6")],
)
def test_lora_linear_rejects(ranks, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(8, 6, ranks)


# ---- freezing

REST = {f"blocks.{i}.norm{j}.{p}" for i in range(2) for j in (1, 2) for p in ("weight", "bias")} | {
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head.bias",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "cls_token",
    "pos_embed",
}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("phase, keep", [("full", None), ("warmup", None), ("lora", ()), ("lora", LORA_REST)])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_trainable_set_of_each_phase(phase, keep, low):
    model = build_vit(None if phase == "full" else MIXED)
    everything = {name for name, _ in model.named_parameters()}
    adapters = {name for name in everything if ".lora_" in name}
    assert get_adapter_names(model) == adapters
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    kept = {"full": everything, "warmup": everything, "lora": adapters | (REST if keep else set())}[phase]
    if phase == "lora":
        assert freeze_base(model, keep) is model and REST < everything
    assert trainable(model) == kept
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in kept) and p.dtype == torch.float32, name
    if phase == "lora":
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(images()).sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == kept  # autograd agrees


def test_freeze_keeps_values_and_rejects_patterns_that_match_nothing():
    model = build_vit(MIXED)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'heads.*' matches no parameter"):
        freeze_base(model, ("norm.*", "heads.*"))
    assert trainable(model) == {name for name, _ in model.named_parameters()}  # nothing half done
    freeze_base(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not trainable(freeze_base(build_vit()))  # control: without adapters nothing is left


# ---- the lowest blocks without adapters and without gradient


def test_rank_0_is_no_adapter():
    plain = build_vit()
    model = build_vit()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ranks = {"q": [0, 2], "k": [0, 0], "v": [0, 4], "fc1": [0, 8], "fc2": [4, 0]}
    add_lora(model, match_families(model, LORA_FAMILIES, tuple(ranks)), ranks)
    adapted = {n: m.ranks for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert adapted == {"blocks.1.attn.qkv": [2, 0, 4], "blocks.1.mlp.fc1": [8], "blocks.0.mlp.fc2": [4]}
    for name in linears.keys() - adapted.keys():
        assert model.get_submodule(name) is linears[name]
    init_adapters(model, 0)
    x = images()
    assert torch.equal(model(x), plain(x))
    randomise_B(model)
    assert not torch.equal(model(x), plain(x))  # control


def test_ranks_of_the_lowest_blocks_are_dropped():
    families = match_families(build_vit(), LORA_FAMILIES, ALL)
    expected = {family: [0, layers[1]] for family, layers in MIXED.items()}
    assert drop_ranks(MIXED, families, get_lowest(1)) == expected
    assert drop_ranks(MIXED, families, get_lowest(0)) == MIXED  # control
    many = {"a": [(f"blocks.{i}.fc", 0, 1) for i in range(12)]}
    assert drop_ranks({"a": [4] * 12}, many, get_lowest(2)) == {"a": [0, 0] + [4] * 10}  # 1 is not 10


def count_backward(model, x):
    """FLOPs of a backward alone."""
    loss = model(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("adapters", [False, True])
def test_backward_ends_above_the_frozen_blocks(adapters):
    ranks = {family: [0, layers[1]] for family, layers in MIXED.items()}
    x = images()

    def build(patterns):
        model = build_vit(ranks if adapters else None)
        if adapters:
            freeze_base(model, LORA_REST)
        return freeze(model, patterns)

    model, whole = build(get_lowest(1)), build(())
    below = ("patch_embed.", "cls_token", "pos_embed", "blocks.0.")
    expected = {name for name in trainable(whole) if not name.startswith(below)}
    assert trainable(model) == expected < trainable(whole)
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    whole_flops = count_backward(whole, x)
    flops = count_backward(model, x)
    assert inputs == [False, False]  # what comes out of the frozen block hangs on nothing
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    # of two equal blocks one is left, or with adapters more than that; a graph through block 0 costs more
    assert flops < 0.7 * whole_flops
    leaky = build(get_lowest(1)[1:])  # control: the patch embedding still trains
    assert count_backward(leaky, x) > flops


def test_freeze_rejects_patterns_that_match_nothing():
    model = build_vit()
    everything = trainable(model)
    with pytest.raises(ValueError, match=r"'blocks.2.\*' matches no parameter"):
        freeze(model, get_lowest(3))  # it has two
    assert trainable(model) == everything
    assert trainable(freeze(model, get_lowest(0))) == everything


class Magnitude(LoRALinear):
    """An adapter with one more parameter (DoRA's, 2402.09353) and a module, under names of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_magnitude = nn.Parameter(torch.ones(self.out_features, 1))
        self.gate = nn.Linear(1, 1)

    def forward(self, x):
        return super().forward(x) * self.gate(self.lora_magnitude)[:, 0]


def test_what_is_an_adapter_the_module_says(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    monkeypatch.setattr("lora.inject.LoRALinear", Magnitude)
    add_lora(model, {"a": [("0", 0, 1)]}, {"a": [2]})
    init_adapters(model, 0)
    own = {"0.lora_A", "0.lora_B.0", "0.lora_magnitude", "0.gate.weight", "0.gate.bias"}
    assert get_adapter_names(model) == trainable(freeze_base(model)) == own
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].lora_magnitude.grad.any()
    # control: a module that says less gets less, and one that says nothing, nothing
    monkeypatch.setattr(Magnitude, "adapter_parameters", lambda self: {"lora_A": self.lora_A})
    assert trainable(freeze_base(model)) == {"0.lora_A"}
    monkeypatch.undo()
    assert (
        get_adapter_names(
            nn.Sequential(nn.Linear(8, 6), nn.ParameterDict({"lora_magnitude": model[0].lora_A}))
        )
        == set()
    )


def test_adapters_may_start_from_the_base_s_weights(monkeypatch):
    """What `init_adapters` reads is what the weights hold when it is called."""

    def start_from_W(self, seed, name):
        self.lora_A.data.copy_(self.weight[: len(self.lora_A)])

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
        add_lora(model, {"a": [("0", 0, 1)]}, {"a": [2]})
    model.to_empty(device="cpu")
    nn.init.normal_(model[0].weight)
    monkeypatch.setattr(LoRALinear, "init_adapters", start_from_W)
    init_adapters(model, 0)
    assert torch.equal(model[0].lora_A, model[0].weight[:2]) and model[0].lora_A.any()


# ---- no ViT


def build_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TABLE = {"up": ("layers.*.linear1", 0, 1), "down": ("layers.*.linear2", 0, 1)}


def add_to_encoder(model):
    add_lora(model, match_families(model, TABLE, ("up", "down")), {"up": [2, 4], "down": [3, 1]})
    init_adapters(model, 0)
    return model


def test_one_step_on_a_transformer_encoder_moves_only_the_adapters(no_fast_path, products):
    model, x = build_encoder(), torch.randn(3, 5, 16)
    expected = use_onednn(model)(x)
    assert torch.equal(add_to_encoder(model)(x), expected)
    freeze_base(model)
    randomise_B(model)  # at B = 0 no gradient reaches A
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {
        f"layers.{i}.linear{j}.{p}" for i in range(2) for j in (1, 2) for p in ("lora_A", "lora_B.0")
    }
    with torch.no_grad():
        tuned = model.eval()(x)
        assert_close(merge_lora(model)(x), tuned)


def test_why_the_fast_path_is_off(no_fast_path):
    """Control: on its inference fast path torch's encoder reads linear1.weight itself, and the adapters never
    run."""
    base = build_encoder().eval()
    model, x = randomise_B(add_to_encoder(copy.deepcopy(base))).eval(), torch.randn(3, 5, 16)
    with torch.no_grad():
        assert not torch.allclose(model(x), base(x), atol=1e-2)
        torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(model(x), base(x))


def test_rank_costs_of_any_model():
    model = build_encoder()
    assert rank_costs(model, match_families(model, TABLE, ("up", "down"))) == {
        "up": [40, 40],
        "down": [40, 40],
    }
    assert rank_costs(nn.Sequential(nn.Linear(8, 6)), {"b": [("0", 1, 3)]}) == {"b": [8 + 2]}
