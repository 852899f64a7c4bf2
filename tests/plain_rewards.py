"""Rewards that are not torch, at the top level of a module without it: worker processes import them."""

import os
import threading


def process_id(x):
    return [float(os.getpid())] * len(x)


def troubled(x):
    """Of one sample (2,): what its first entry asks for."""
    kind = int(x[0])
    if kind == 1:
        raise OSError("no connection")
    if kind == 2:
        os._exit(7)
    if kind == 3:
        threading.Event().wait(600)
    if kind == 4:
        return float("nan")
    if kind == 5:
        return [1.0, 2.0]
    if kind == 6:
        return "good"
    return float(x[1])
