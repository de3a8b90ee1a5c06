"""A prefill worker: computes prompts and hands their KV over. With --role both it also decodes."""

import sys

from tidemill.worker.config import Role
from tidemill.worker.process import main

if __name__ == "__main__":
    sys.exit(main("prefill", (Role.PREFILL, Role.BOTH)))
