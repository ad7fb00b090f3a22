"""model/vit.py against timm and Hugging Face, and its initialisation, dropout, drop path, meta device."""

import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_parallel import full_of_garbage
from torch import nn

from lora.inject import add_lora, match_families
from model.huggingface import from_huggingface
from model.parallel import materialise
from model.variants import LORA_FAMILIES, LORA_REST, VARIANTS
from model.vit import DropPath, VisionTransformer

SMALL = dict(embed_dim=48, depth=3, num_heads=4, patch_size=4)


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
    monkeypatch.setitem(VARIANTS, "small", SMALL)
    torch.manual_seed(0)


@torch.no_grad()
def randomise(model, std=0.1):
    """Every parameter, those that usually start at 0 or 1 included: a bias that nobody adds must show."""
    for name, p in model.named_parameters():
        p.normal_(std=std)
        if "norm" in name and name.endswith("weight"):
            p.add_(1.0)
    return model


def build(variant="small", image_size=16, num_classes=7, seed=0, **kwargs):
    model = VisionTransformer(variant, image_size, num_classes, **kwargs)
    model.init_weights(seed)
    return model


# ---- parity


@pytest.mark.parametrize(
    "variant, name", [("Ti/16", "vit_tiny_patch16_224"), ("S/16", "vit_small_patch16_224")]
)
def test_logits_equal_timms(variant, name):
    timms = randomise(timm.create_model(name, num_classes=11), std=0.05).eval()
    ours = VisionTransformer(variant, 224, 11).eval()
    ours.load_state_dict(timms.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, got = timms(x), ours(x)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert (expected[0] - expected[1]).abs().max() > 1e-2  # the logits do depend on the image
        ours.blocks[-1].attn.qkv.weight[:192].neg_()  # control: one wrong slice is seen
        assert (ours(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "variant, name, millions",
    [  # the literature's counts, 1000 classes at 224
        ("Ti/16", "vit_tiny_patch16_224", 5.717),
        ("S/16", "vit_small_patch16_224", 22.051),
        ("B/16", "vit_base_patch16_224", 86.568),
        ("L/16", "vit_large_patch16_224", 304.327),
    ],
)
def test_names_shapes_and_counts(variant, name, millions):
    with torch.device("meta"):
        timms, ours = timm.create_model(name), VisionTransformer(variant, 224, 1000)
    shapes = lambda model: {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert shapes(ours) == shapes(timms)
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 3) == millions
    assert ours.blocks[0].attn.num_heads == timms.blocks[0].attn.num_heads and len(ours.blocks) == len(
        timms.blocks
    )


@pytest.fixture
def huggingface():
    """A small random ViT whose first LayerNorms see variances near 1e-6, where their epsilon matters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=16,
        patch_size=4,
        num_labels=7,
        layer_norm_eps=1e-12,
    )
    model = randomise(ViTForImageClassification(config)).eval()
    with torch.no_grad():
        for p in model.vit.embeddings.parameters():
            p.mul_(1e-2)
    return model


@torch.no_grad()
def difference(huggingface, state_dict, eps=1e-12):
    x = torch.randn(4, 3, 16, 16)
    ours = VisionTransformer("small", 16, 7, layer_norm_eps=eps).eval()
    ours.load_state_dict(state_dict, strict=True)
    return (ours(x) - huggingface(pixel_values=x).logits).abs().max()


@pytest.mark.parametrize("published", [False, True])
def test_logits_equal_huggingfaces(huggingface, published, tmp_path):
    names = huggingface.state_dict()
    if published:  # save_pretrained writes the names that the hub's files have
        huggingface.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors")
    assert ("vit.encoder.layer.0.attention.attention.query.weight" in names) == published
    renamed = from_huggingface(names)
    assert difference(huggingface, renamed) < 1e-5
    # controls: epsilon matters, and so does the order of q, k, v
    assert difference(huggingface, renamed, eps=1e-6) > 1e-3
    q, k, v = renamed["blocks.1.attn.qkv.weight"].chunk(3)
    assert difference(huggingface, renamed | {"blocks.1.attn.qkv.weight": torch.cat([k, v, q])}) > 1e-3
    q, k, v = renamed["blocks.1.attn.qkv.bias"].chunk(3)
    assert difference(huggingface, renamed | {"blocks.1.attn.qkv.bias": torch.cat([k, q, v])}) > 1e-3


@pytest.mark.parametrize(
    "key", ["vit.pooler.dense.weight", "vit.layers.0.attention.q_proj.weight.x", "norm.weight"]
)
def test_unknown_huggingface_name(huggingface, key):
    with pytest.raises(KeyError, match=key):
        from_huggingface(huggingface.state_dict() | {key: torch.zeros(1)})


def test_wrong_arguments():
    with pytest.raises(KeyError, match="XXL/16"):
        VisionTransformer("XXL/16", 224, 10)
    with pytest.raises(ValueError, match="30 is not a multiple of small's patch size 4"):
        VisionTransformer("small", 30, 10)


def test_rest_patterns_and_families_cover_the_model():
    """The target modules and LORA_REST between them name every parameter, none twice."""
    from fnmatch import fnmatchcase

    model = build()
    families = match_families(model, LORA_FAMILIES, tuple(LORA_FAMILIES))
    linears = {name for layers in families.values() for name, _, _ in layers}
    for name, _ in model.named_parameters():
        assert (name.rpartition(".")[0] in linears) != any(
            fnmatchcase(name, pattern) for pattern in LORA_REST
        ), name


# ---- stochastic depth and dropout


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.ones(20_000, 2, 3)
    out = DropPath(0.3)(x)
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()  # a sample goes as a whole
    values, counts = per_sample[:, 0].unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0, 1 / 0.7]))
    assert abs(counts[0] / 20_000 - 0.3) < 0.015  # 4.6 standard deviations
    assert abs(out.mean() - 1) < 0.02
    assert torch.equal(DropPath(0.0)(x), x) and torch.equal(DropPath(0.3).eval()(x), x)


def test_drop_path_rises_linearly_from_zero():
    model = build(drop_path=0.3)
    assert [b.drop_path.p for b in model.blocks] == pytest.approx([0, 0.15, 0.3])
    assert [b.drop_path.keep_prob.item() for b in model.blocks] == pytest.approx([1, 0.85, 0.7])
    assert all(type(b.drop_path) is nn.Identity for b in build().blocks)
    assert "keep_prob" not in str(model.state_dict().keys())  # or timm's state dict would not load strictly


@pytest.mark.parametrize("kwargs", [dict(dropout=0.5), dict(drop_path=0.5)])
def test_active_in_training_only(kwargs):
    model, plain, x = randomise(build(**kwargs)), build(), torch.randn(4, 3, 16, 16)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(plain.train()(x), plain(x))  # control: without either, training is deterministic


def test_dropout_after_positions_attention_and_both_mlp_layers():
    model = build(dropout=0.25).train()
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.randn(1, 3, 16, 16))
    block = [".attn.proj_drop", ".mlp.drop", ".mlp.drop"]
    assert calls == ["pos_drop"] + [f"blocks.{i}{name}" for i in range(3) for name in block]


# ---- initialisation


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_residual_dtype(residual_dtype):
    """The stream between the blocks, and its gradient, have this type when products are in bfloat16."""
    model = randomise(build(residual_dtype=residual_dtype))
    images, seen = torch.randn(4, 3, 16, 16), []
    exact = randomise_alike(model, build())(images)
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, y: seen.extend([args[0].dtype, y.dtype]))
        block.register_full_backward_hook(lambda block, dx, dy: seen.extend(g[0].dtype for g in (dx, dy)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    logits.float().sum().backward()
    assert seen == [residual_dtype] * 4 * len(model.blocks)
    error = (logits - exact).norm() / exact.norm()
    assert error < 0.03


def randomise_alike(model, other):
    """`other`, with the weights of `model`."""
    other.load_state_dict(model.state_dict())
    return other


def test_init_is_a_pure_function_of_the_seed():
    torch.manual_seed(1)
    first = build(seed=3)
    torch.manual_seed(2)
    # another past, other generator state, other order of modules, adapters beside
    second = randomise(build(seed=9), std=5.0)
    second.blocks = nn.ModuleList(second.blocks)
    second.head = second._modules.pop("head")
    second._modules = dict(reversed(second._modules.items()))
    add_lora(second, match_families(second, LORA_FAMILIES, ("q", "fc1")), {"q": [4] * 3, "fc1": [2] * 3})
    state = torch.get_rng_state()
    second.init_weights(3)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the global generator alone
    weights = second.state_dict()
    for name, t in first.state_dict().items():
        assert torch.equal(t, weights[name]), name
    assert not torch.equal(first.pos_embed, build(seed=4).pos_embed)
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, first.blocks[1].mlp.fc1.weight)


def test_init_distributions():
    model = build("tiny-debug", 28, 10)
    dim, weights = 96, dict(model.named_parameters())
    for name, p in weights.items():
        if name in ("cls_token", "head.weight") or name.endswith("bias") and ".mlp." not in name:
            assert not p.any(), name
        elif name.endswith("bias"):
            assert 0.8e-6 < p.std() < 1.2e-6, name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name == "pos_embed":
            assert abs(p.std() - 0.02) < 1e-3
        elif (
            name == "patch_embed.proj.weight"
        ):  # LeCun: variance 1 / fan in, after the cut at two of its own σ
            std = math.sqrt(1 / (3 * 7 * 7))
            assert abs(p.std() / std - 1) < 0.03 and p.abs().max() <= 2 * std / 0.8796 + 1e-6
        else:
            for part in p.chunk(3) if "qkv" in name else [p]:
                bound = math.sqrt(6 / sum(part.shape))  # xavier: of q, k, v each (96, 96), not of (288, 96)
                assert 0.98 * bound < part.abs().max() <= bound, name
                assert abs(part.std() / (bound / math.sqrt(3)) - 1) < 0.03, name
    assert 0.98 * math.sqrt(6 / (2 * dim)) > math.sqrt(6 / (4 * dim))  # control: the fused bound would fail
    q, k, v = weights["blocks.0.attn.qkv.weight"].chunk(3)
    assert not torch.equal(q, k) and not torch.equal(k, v)
    assert not model.eval()(torch.randn(2, 3, 28, 28)).any()  # zero head: every logit is 0


# ---- meta device


def build_on_meta(**kwargs):
    with torch.device("meta"):
        model = VisionTransformer("small", 16, 7, **kwargs)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    return model


def test_meta_build_equals_direct_build():
    options = {"drop_path": 0.3, "dropout": 0.1}
    direct, x = randomise(build(**options)), torch.randn(2, 3, 16, 16)
    with full_of_garbage():
        trap = build_on_meta(**options).to_empty(device="cpu")
        fresh, loaded = (materialise(build_on_meta(**options), "cpu") for _ in range(2))
    fresh.init_weights(0)
    loaded.load_state_dict(direct.state_dict())
    trap.load_state_dict(direct.state_dict())
    assert trap.blocks[1].drop_path.keep_prob.isnan()  # the trap: no state dict brings the buffers back
    outputs = []
    for model in (direct, loaded):
        torch.manual_seed(5)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)
    again = build(drop_path=0.3, dropout=0.1)
    for a, b in zip(
        [*fresh.parameters(), *fresh.buffers()], [*again.parameters(), *again.buffers()], strict=True
    ):
        assert torch.equal(a, b)
