"""Every model of torchvision and timm: traced, shrunk, exported, checked; one row per model."""
