"""Sizes of the Vision Transformer and names of its parts, as tables that import nothing."""

# Ti, S: Touvron et al. 2012.12877, table 1; B, L: Dosovitskiy et al. 2010.11929, table 1. tiny-debug has
# every part of the large ones and none of their size; small-study is the narrowest whose LoRA step is clearly
# faster on a CPU.
VARIANTS = {
    "tiny-debug":  {"embed_dim": 64,   "depth": 4,  "num_heads": 2,  "patch_size": 7},
    "small-study": {"embed_dim": 320,  "depth": 3,  "num_heads": 5,  "patch_size": 14},
    "Ti/16":       {"embed_dim": 192,  "depth": 12, "num_heads": 3,  "patch_size": 16},
    "S/16":        {"embed_dim": 384,  "depth": 12, "num_heads": 6,  "patch_size": 16},
    "B/16":        {"embed_dim": 768,  "depth": 12, "num_heads": 12, "patch_size": 16},
    "L/16":        {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
}  # fmt: skip

# What lies below the blocks, and is frozen with the lowest of them.
BELOW = ("patch_embed.*", "cls_token", "pos_embed")


def get_lowest(blocks: int) -> tuple[str, ...]:
    """Patterns of the names of all that lies in the lowest `blocks` blocks and below them; () for none."""
    if not blocks:
        return ()
    return (*BELOW, *(f"blocks.{i}.*" for i in range(blocks)))


# The paper's target modules α: family -> (pattern of the Linear's name, row part, number of row parts).
# q, k, v are the three row slices of the fused qkv; the paper's "dense" is fc1, its "output" is proj and fc2.
LORA_FAMILIES = {
    "q":    ("blocks.*.attn.qkv",  0, 3),
    "k":    ("blocks.*.attn.qkv",  1, 3),
    "v":    ("blocks.*.attn.qkv",  2, 3),
    "proj": ("blocks.*.attn.proj", 0, 1),
    "fc1":  ("blocks.*.mlp.fc1",   0, 1),
    "fc2":  ("blocks.*.mlp.fc2",   0, 1),
}  # fmt: skip

# What `lora_trainable=adapters+rest` trains besides the adapters: head, norms and embeddings.
LORA_REST = ("head.*", "norm.*", "blocks.*.norm?.*", "patch_embed.*", "cls_token", "pos_embed")
