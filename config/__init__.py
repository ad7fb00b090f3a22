"""Presets: plain assignments of what differs from the defaults of train.py's Config."""
