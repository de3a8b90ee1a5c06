"""Tidemill: serving and metering of DeepSeek-V3-architecture models."""
