"""Guided search: a score model learns from few judged networks and decides."""
