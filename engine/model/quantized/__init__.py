"""Quantized weights: schemes, the formats they lie in on disk, and the layers that multiply with them."""
