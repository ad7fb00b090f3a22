"""How a model is compiled (and, on several GPUs, sharded): one place, one order."""

import torch
from torch import nn


def parallelize(model: nn.Module, compile: bool) -> nn.Module:
    """Compile each block of `model.blocks` in place: one region, traced once, whose graph all blocks share.

    In place (`block.compile()`), so that no parameter gets an `_orig_mod.` name. A whole run needs 4 training graphs (full 1,
    warmup 1, lora 2: the first block's input needs no gradient there) and 1 for evaluation in each phase, whatever the depth
    and the ranks (`lora.inject.mark_ranks_dynamic`). The recompile limit counts per code object, so over all blocks and
    phases; with fullgraph a run that hits it stops, without it would silently go on in eager mode.
    """
    if compile:
        torch._dynamo.config.recompile_limit = 16
        for block in model.blocks:
            block.compile(fullgraph=True)
    return model
