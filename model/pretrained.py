"""Weights that come from elsewhere, made to fit a model: its head, its image size, its images'
normalisation."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from errors import UserError
from model.sources import Pretrained, read_pretrained
from model.variants import VARIANTS

HEAD = ("head.weight", "head.bias")


def load_pretrained(
    source: str, model: nn.Module, mean: tuple, std: tuple, fresh_head: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of `source` for `model` (on meta will do) and images normalised by `mean` and `std`.

    Returns (weights, what was done to make them fit, in sentences). Raises UserError where they can't be had
    or don't fit.
    """
    found = read_pretrained(source)
    weights, notes = fit_weights(found.weights, model, source, fresh_head, found.grid)
    notes = [*found.notes, *notes]
    if not found.grid:
        side = math.isqrt(found.weights["pos_embed"].shape[1] - 1)
        notes.append(f"it does not say its grid of patches: taken as a square, {side} × {side}")
    heads, eps = model.blocks[0].attn.num_heads, model.norm.eps
    if found.num_heads not in (None, heads):
        raise UserError(f"{source} has {found.num_heads} attention heads, this model has {heads}")
    if found.layer_norm_eps not in (None, eps):
        notes.append(
            f"warning: its layer_norm_eps is {found.layer_norm_eps:g}, this model's {eps:g}: "
            f"--layer_norm_eps {found.layer_norm_eps:g} keeps its function"
        )
    if found.mean is None or found.std is None:
        notes.append(f"it does not say how its images were normalised: taken as here, mean {mean}, std {std}")
    elif (found.mean, found.std) != (tuple(mean), tuple(std)):
        weights = renormalise(weights, found.mean, found.std, mean, std)
        notes.append(
            f"its images were normalised by mean {found.mean}, std {found.std}: "
            "the difference is in the patch embedding now"
        )
    return weights, notes


def fit_weights(
    weights: dict[str, Tensor],
    model: nn.Module,
    source: str,
    fresh_head: bool = False,
    grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """(weights, notes): by name and shape those of `model`, or UserError saying what differs.

    Positions of another image size are interpolated, as timm does, from `grid`, patches in height and width;
    where the source doesn't say (None) they must be as many as the model's. `fresh_head`: the weights' head,
    if any, is left out.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in sorted(weights.keys() & shapes.keys()):
        if weights[name].ndim != len(shapes[name]):
            raise misshapen(source, name, weights[name], shapes[name])
    head = {name: t for name, t in weights.items() if name in HEAD}
    weights = {name: t for name, t in weights.items() if name not in HEAD}
    body = shapes.keys() - set(HEAD)
    here, there = describe(shapes), describe({name: tuple(t.shape) for name, t in weights.items()})
    if there and here != there:
        raise UserError(f"{source} is a ViT of {there}, this model of {here}")
    for names, what in (
        (body - weights.keys(), "has no"),
        (weights.keys() - body, "has a parameter that this model hasn't,"),
    ):
        if names:
            raise UserError(f"{source} is not a ViT of this kind: it {what} {min(names)}")
    weights["pos_embed"], notes = fit_positions(weights["pos_embed"], shapes["pos_embed"], grid, source)
    for name in sorted(body):
        if tuple(weights[name].shape) != shapes[name]:
            raise misshapen(source, name, weights[name], shapes[name])
    if not fresh_head:
        check_head(head, shapes, source)
        return weights | head, notes
    old = ""
    if head:
        old = f" instead of its own for {len(next(iter(head.values())))}"
    return weights, [*notes, f"a fresh head for {shapes['head.weight'][0]} classes{old}"]


def misshapen(source: str, name: str, tensor: Tensor, shape: tuple) -> UserError:
    return UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, this model's {shape}")


def fit_positions(
    positions: Tensor, shape: tuple, grid: tuple[int, int] | None, source: str
) -> tuple[Tensor, list[str]]:
    """(positions of `shape` (1, 1 + side², D), what was done to them).

    `grid`: patches in height and width that they are of; None where nobody says, and then it is the model's
    where there are as many. Raises UserError where they can't be fitted.
    """
    old = tuple(positions.shape)
    patches, side = old[1] - 1, math.isqrt(shape[1] - 1)
    if old[2] != shape[2]:
        raise misshapen(source, "pos_embed", positions, shape)
    if grid and grid[0] * grid[1] != patches:
        raise UserError(
            f"{source}: its config says {grid[0]} × {grid[1]} patches, pos_embed of shape {old} is not of a "
            "class token and so many"
        )
    if not grid and patches != side**2:
        raise UserError(
            f"{source} has positions of {patches} patches, this model's are {side} × {side}, and nothing "
            "says how many are in height and in width: put the model's config.json beside it, which says "
            "its image_size (timm: model_args' img_size), or choose the --image_size at which they fit"
        )
    if grid in (None, (side, side)):
        return positions, []
    note = f"positions interpolated from {grid[0]} × {grid[1]} to {side} × {side}"
    return interpolate_positions(positions, grid, side), [note]


def check_head(head: dict[str, Tensor], shapes: dict[str, tuple], source: str) -> None:
    """Raise UserError unless `head` is whole and of the shapes of the model's."""
    classes = shapes["head.weight"][0]
    if len(head) < len(HEAD):
        what = "half a" if head else "no"
        raise UserError(
            f"{source} has {what} head: --fresh_head True starts with a new one, for {classes} classes"
        )
    found, wanted = [tuple(head[name].shape) for name in HEAD], [shapes[name] for name in HEAD]
    if found[0][0] != classes:
        raise UserError(
            f"{source} is for {found[0][0]} classes, this model for {classes}: "
            "--fresh_head True starts with a new head"
        )
    if found != wanted:
        raise UserError(
            f"{source}: the head's weight and bias have shapes {found[0]} and {found[1]}, "
            f"this model's {wanted[0]} and {wanted[1]}"
        )


def describe(shapes: dict[str, tuple]) -> str | None:
    """What tells one ViT from another, by its parameters' shapes; None if it is no ViT."""
    for name in ("cls_token", "patch_embed.proj.weight"):
        if not shapes.get(name):  # absent, or of no dimension
            return None
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    return (
        f"width {shapes['cls_token'][-1]}, {depth} blocks, patches of {shapes['patch_embed.proj.weight'][-1]}"
    )


def find_variant(found: Pretrained, source: str) -> str:
    """The row of VARIANTS that weights are of. Raises UserError if there is none."""
    kind = describe({name: t.shape for name, t in found.weights.items()})
    for name, row in VARIANTS.items():
        same = kind == f"width {row['embed_dim']}, {row['depth']} blocks, patches of {row['patch_size']}"
        if same and found.num_heads in (None, row["num_heads"]):
            return name
    raise UserError(f"{source} is of none of the models here: {', '.join(VARIANTS)}")


def interpolate_positions(positions: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """(1, 1 + H·W, D) -> (1, 1 + side², D): the class token's stays, the others' `grid` (H, W) is resized.

    Bicubic with antialiasing, as timm's resample_abs_pos_embed does.
    """
    cls, patches = positions[:, :1].float(), positions[:, 1:].float()
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, H, W)
    patches = F.interpolate(patches, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


def renormalise(
    weights: dict[str, Tensor], mean: tuple, std: tuple, new_mean: tuple, new_std: tuple
) -> dict[str, Tensor]:
    """Weights for images normalised by `new_mean` and `new_std` that do what `weights` do for `mean` and
    `std`.

    Each has three numbers, in units of the full range. A pixel x there is x · new_std / std + (new_mean -
    mean) / std here, which the patch embedding takes in. Exact: it pads nothing.
    """
    mean, std, new_mean, new_std = [
        torch.tensor(values, dtype=torch.float64) for values in (mean, std, new_mean, new_std)
    ]
    weight = weights["patch_embed.proj.weight"].double()  # (D, 3, P, P)
    bias = weights["patch_embed.proj.bias"].double()  # (D,)
    bias = bias + weight.sum(dim=(2, 3)) @ ((new_mean - mean) / std)
    weight = weight * (new_std / std)[:, None, None]
    return weights | {"patch_embed.proj.weight": weight.float(), "patch_embed.proj.bias": bias.float()}


@torch.no_grad()
def copy_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put process 0's `weights` into the model on every process, whole or sharded; the others' don't count.

    Parameters that are not among them keep their values. All processes together: each parameter is sent to
    all, one at a time.
    """
    several = dist.is_initialized()
    has_weights = not several or dist.get_rank() == 0
    names = [list(weights)]
    if several:
        dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        p = model.get_parameter(name)
        tensor = torch.empty(p.shape, device=p.device)
        if has_weights:
            tensor.copy_(weights[name])
        if several:
            dist.broadcast(tensor, src=0)
        if isinstance(p, DTensor):
            tensor = distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(tensor)
