"""The log-linear score model."""
