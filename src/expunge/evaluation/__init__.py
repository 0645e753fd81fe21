"""Evaluators return one value per example (`examples`); means and intervals live in `stats`."""
