"""Multi-head latent attention for a chunk of one prompt, in multi-head form."""

from tidemill.kernels.mla_prefill.reference import mla_prefill

__all__ = ["mla_prefill"]
