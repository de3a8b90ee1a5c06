"""`python -m loadtest [locust's options]`: one headless run, a table, an exit status."""

import logging
import sys
from pathlib import Path

from locust.main import main  # patches the standard library for gevent: before anything else

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    locustfile = str(Path(__file__).with_name("locustfile.py"))
    ours = ["-f", locustfile, "--headless", "--only-summary", "--skip-log-setup"]
    sys.argv = ["loadtest", *ours, *sys.argv[1:]]
    main()
