"""Scoring: which runs on which cases, the reading of these, the scores, and the figures and pages made of them."""
