"""Scoring: what is scored on which cases, the cases, their scores, and the pictures and pages made of them."""
