"""Multi-head latent attention for one new token per sequence, absorbed, over the paged cache."""

from tidemill.kernels.mla_decode.reference import mla_decode

__all__ = ["mla_decode"]
