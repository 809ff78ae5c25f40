"""Inception, the classifier of ImageNet in whose features images are compared (FID, sFID, Inception score)."""
