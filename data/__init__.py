"""Images from disk to uint8 batches, order and augmentations a pure function of (seed, epoch, image)."""
