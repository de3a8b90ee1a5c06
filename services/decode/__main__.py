"""A decode worker: generates from KV pulled from prefill workers. With --role both, its own too."""

import sys

from tidemill.worker.config import Role
from tidemill.worker.process import main

if __name__ == "__main__":
    sys.exit(main("decode", (Role.DECODE, Role.BOTH)))
