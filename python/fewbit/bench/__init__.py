"""Measurements that a user can repeat on a model of their own: ``fewbit bench``."""
