"""Image data: where they come from, augmentation, held-out and confusion sets."""
