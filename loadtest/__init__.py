"""Load on a running router, each answer's usage checked: `python -m loadtest --help`."""
