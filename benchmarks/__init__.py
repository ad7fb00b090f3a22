"""The commands of bench.py."""
