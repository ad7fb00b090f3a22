"""Running train.py on many nodes."""
