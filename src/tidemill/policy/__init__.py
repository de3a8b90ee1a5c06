"""Where requests go and in which order: pure, with clock and random source passed in."""

from tidemill.policy.balancer import (
    BalancerConfig,
    Placement,
    Scored,
    pick_decode,
    pick_prefill,
    room_in_s,
    score_decode,
    score_prefill,
)
from tidemill.policy.fair_queue import Ahead, FairQueue, Priority, QueueLimits
from tidemill.policy.fetch_or_recompute import (
    Budget,
    CostLine,
    FetchConfig,
    FetchOrRecompute,
    Run,
    Source,
)
from tidemill.policy.in_place import pick_in_place
from tidemill.policy.load import (
    InFlight,
    OutputLengths,
    ReportClock,
    TierOverlap,
    Work,
    WorkerLoad,
)
from tidemill.policy.placement import (
    Topology,
    balancedness,
    gpu_loads,
    move_experts,
    num_moves,
    place_experts,
)
from tidemill.policy.prefix_index import KvChange, PrefixIndex
from tidemill.policy.queue_model import QueueModel

__all__ = [
    "Ahead",
    "BalancerConfig",
    "Budget",
    "CostLine",
    "FairQueue",
    "FetchConfig",
    "FetchOrRecompute",
    "InFlight",
    "KvChange",
    "OutputLengths",
    "Placement",
    "PrefixIndex",
    "Priority",
    "QueueLimits",
    "QueueModel",
    "ReportClock",
    "Run",
    "Scored",
    "Source",
    "TierOverlap",
    "Topology",
    "Work",
    "WorkerLoad",
    "balancedness",
    "gpu_loads",
    "move_experts",
    "num_moves",
    "pick_decode",
    "pick_in_place",
    "pick_prefill",
    "place_experts",
    "room_in_s",
    "score_decode",
    "score_prefill",
]
