"""The service processes. Run from the repository or an image, never installed."""
