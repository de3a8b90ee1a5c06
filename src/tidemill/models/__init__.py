"""DeepSeek-V3-architecture models: configuration, checkpoint loading, layers."""
