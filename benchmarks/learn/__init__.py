"""Compare strategies: cost of a step, and rank correlation with stand-alone trainings."""
