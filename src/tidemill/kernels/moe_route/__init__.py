"""Choice of experts for each token."""

from tidemill.kernels.moe_route.reference import moe_route

__all__ = ["moe_route"]
