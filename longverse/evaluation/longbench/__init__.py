"""LongBench v1, LongBench-E and LongBench v2: protocol, metrics and tables."""
