"""Evolutionary search, with a first population drawn from the training history."""
