"""The last step of all loaders: numpy arrays to a batch of fresh tensors, always of the same shape."""

import numpy as np
import torch


def to_batch(images: np.ndarray, labels: np.ndarray, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy images (n, H, W, 3) uint8 and labels (n,) into fresh tensors of batch_size rows.

    Returns images (batch_size, 3, H, W) uint8 channels_last and labels (batch_size,) int64, pinned where CUDA
    is. Rows beyond n are black with label -1, so that compiled graphs see one shape.
    """
    n = len(images)
    pin = torch.cuda.is_available()
    padded = torch.empty(batch_size, *images.shape[1:], dtype=torch.uint8, pin_memory=pin)  # (B, H, W, 3)
    targets = torch.full((batch_size,), -1, dtype=torch.int64, pin_memory=pin)  # (B,)
    # By numpy: a copy by torch's threads waits for the training loop's.
    padded.numpy()[:n] = images
    padded.numpy()[n:] = 0
    targets.numpy()[:n] = labels
    return padded.permute(0, 3, 1, 2), targets


def empty_batch(batch_size: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding alone.

    A process whose images end a batch before another's needs it, because all must go through the model
    together.
    """
    return to_batch(np.zeros((0, image_size, image_size, 3), np.uint8), np.zeros(0, np.int64), batch_size)
