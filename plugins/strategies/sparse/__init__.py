"""Sparse training: a penalty on the norms of whole units."""
