"""All threads of this process allocate from one heap, from the import of this module on.

For a process that is the cache and nothing else, and before anything that starts threads, be it
only while it is imported. glibc would give each thread a heap of its own, and what is freed stays
with the heap it came from: blocks read from disk lay on the readers' heaps as long as memory held
them, in an order that left holes, and so each of those grew under a steady load for most of an
hour, to hold what only blocks from disk could use again. Other C libraries keep no such heaps.
"""

import ctypes

_M_ARENA_MAX = -8  # malloc.h

_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
if _mallopt is not None:
    _mallopt(_M_ARENA_MAX, 1)
